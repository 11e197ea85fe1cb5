"""When the ranges of a hooked model move: after each step of its weights, before anybody reads them, and not once they are frozen."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.outliers import Outliers
from lightning_cco.quantization.range_updates import forget_batches, update_ranges, world_size
from lightning_cco.quantization.scale_learner import ScaleLearner
from lightning_cco.quantization.tensor_key import TensorKey
from lightning_cco.quantization.weight_quantizer import WeightQuantizer

_MOVING = threading.RLock()


class MovingRanges:
    """Lets the ranges and the learned scales of a model follow its training.

    Args:
        model: The model.
        activations: Its quantizers of activations.
        weights: Those of its weights.
        rate: How fast learned scales move.

    Attributes:
        scales: What moves learned scales.
        outliers: Which tensors' last batch was an outlier.
        calibrated: Whether the ranges are known; before that nothing moves.
        frozen: Whether the ranges stay as they are.
        held: Whether an optimizer is in the midst of a step, which may run the model several times.
    """

    scales: ScaleLearner

    def __init__(
        self,
        model: nn.Module,
        activations: Mapping[TensorKey, ActivationQuantizer],
        weights: Mapping[str, Sequence[WeightQuantizer]],
        rate: float,
    ) -> None:
        self.calibrated = False
        self.frozen = self.held = False
        self._model = model
        self._trained = [p for p in model.parameters() if p.requires_grad and not p.is_inference()]
        self._moved_at = self._weights_version()
        self.outliers = Outliers()
        self._mode = model.training
        self.load(activations, weights, rate)

    def load(
        self, activations: Mapping[TensorKey, ActivationQuantizer], weights: Mapping[str, Sequence[WeightQuantizer]], rate: float
    ) -> None:
        """Take other quantizers."""
        self._activations = activations
        self.scales = ScaleLearner(activations.values(), weights.values(), rate)

    def move(self) -> None:
        """Follow what has passed in training since the ranges last moved; under DDP equally on all ranks."""
        if self.scales and self.calibrated and self._moved_at != self._weights_version():
            self.scales.move()
        self._moved_at = self._weights_version()
        if not self.frozen and self.calibrated:
            quantizers = list(self._activations.values())
            moving = [key for key, quantizer in self._activations.items() if not quantizer.fixed]
            found = update_ranges(quantizers, self.outliers.last(moving, quantizers[0].scale.device) if moving else None)
            if found is not None:
                self.outliers.note(moving, found)

    def move_if_due(self) -> None:
        """Follow, if weights have changed since the ranges last moved. Of several threads one moves them, once."""
        if self._due():
            with _MOVING:
                if self._due():
                    self.move()

    def before_forward(self) -> None:
        """Follow, if it is due; forget what an evaluation has shown."""
        if not (self.held and torch.is_grad_enabled()):
            self.move_if_due()
        if torch.is_grad_enabled() and self._mode != self._model.training:
            # What an evaluation that forgot `torch.no_grad` has shown is no part of the training, and the other way round.
            self._mode = self._model.training
            forget_batches(list(self._activations.values()))

    def before_saving(self) -> None:
        """Follow what the last step has shown, if it was one of the training, and warn of outliers that no step has waited for."""
        if world_size() == 1 and self._mode:
            self.move()
        self.outliers.warn()  # on an accelerator each step would have to wait for the device

    def freeze(self) -> None:
        """Keep all ranges as they are from now on."""
        self.move_if_due()
        for quantizer in self._activations.values():
            quantizer.freeze()
        self.frozen = True

    def unfreeze(self) -> None:
        """Let the ranges follow the activations again, also those that ``auto`` froze."""
        for quantizer in self._activations.values():
            quantizer.unfreeze()
        self.frozen = False

    def _weights_version(self) -> int:
        return sum(parameter._version for parameter in self._trained)

    def _due(self) -> bool:
        """Whether weights have changed since the ranges last moved. Under DDP all ranks move them together, when `move` is called."""
        return (
            self.calibrated and (not self.frozen or bool(self.scales)) and world_size() == 1 and self._moved_at != self._weights_version()
        )
