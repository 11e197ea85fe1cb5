"""A model with quantization hooked on: planned, calibrated, run, saved."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cco.errors import CCOError
from lightning_cco.graph.captured import Capture
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.graph.modes import evaluating, random_apart, uncollected
from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.already_quantized import refuse_quantized_parts
from lightning_cco.quantization.bias_correction import BiasCorrection, Shifts, corrected_channels
from lightning_cco.quantization.build_quantizers import build_quantizers
from lightning_cco.quantization.calibration import check_weights, chosen_quantizers, finish_calibration, warn_of_zeros
from lightning_cco.quantization.forward_call import Forward, call_with
from lightning_cco.quantization.moving_ranges import MovingRanges
from lightning_cco.quantization.phases import Phase
from lightning_cco.quantization.planner import plan_quantization
from lightning_cco.quantization.runtime import Runtime
from lightning_cco.quantization.scale_learner import ScaleLearner
from lightning_cco.quantization.state import check_fits, load_corrections, load_ranges, load_weight_scales, plan_differences, state_of
from lightning_cco.quantization.tensor_key import TensorKey
from lightning_cco.quantization.untrained_norms import by_batch_statistics, untrained_norms, warn_of_evaluation_mode, warn_of_frozen_ranges
from lightning_cco.quantization.weight_quantizer import WeightQuantizer
from lightning_cco.settings import Settings, load_settings


class HookedModel:
    """A model, its layer graph, its plan and its quantizers. They are added to the model by hooks; `remove` removes these.

    Args:
        model: The model.
        captured: Its captured layers.
        settings: The recipe.
        suggestions: Layers to skip because of their sensitivity.

    Attributes:
        model: The model, the same object.
        graph: Its layer graph.
        plan: Which layers and tensors are quantized, and why others are not.
        settings: The recipe.
        weights: Quantizers of each layer's weights.
        corrections: The correction of each layer's bias; empty without ``bias_correction``.
        example: Positional and keyword arguments of one forward, for exports.
        uncalibrated: Quantizers that have no range after a state was loaded or the plan changed.
    """

    @uncollected()
    def __init__(self, model: nn.Module, captured: Capture, settings: Settings, suggestions: Iterable[str] = ()) -> None:
        refuse_quantized_parts(model, captured)
        self.model = model
        self.capture = captured
        self.settings = settings
        self.plan = plan_quantization(captured.graph, settings, suggestions)
        self._activations: dict[TensorKey, ActivationQuantizer]
        self.weights: dict[str, list[WeightQuantizer]]
        self.corrections: dict[str, BiasCorrection] = {}
        self.uncalibrated: list[str] = []
        self.example: tuple[Sequence[Any], Mapping[str, Any] | None] = ((), None)
        self._activations, self.weights = build_quantizers(model, captured, self.plan, settings, {}, {})
        self._ranges = MovingRanges(model, self._activations, self.weights, settings.training_settings.scale_learning_rate)
        self.runtime = Runtime(model, captured, self.plan, self._activations, self.weights)
        self.runtime.phase, self._starts = Phase.PASS, 0
        self.runtime.frames.started = self._forward_starts
        self.runtime.frames.owner = weakref.ref(self)
        self.runtime.frames.attach()
        self.to(self.device)

    @property
    def graph(self) -> LayerGraph:
        """The layer graph."""
        return self.capture.graph

    @property
    def activations(self) -> dict[TensorKey, ActivationQuantizer]:
        """Quantizer of each fake-quantized tensor by name. Ranges are first updated with the observations of the last step."""
        self._ranges.move_if_due()
        return self._activations

    @property
    def calibrated(self) -> bool:
        """Whether the ranges are known. Before that the model computes in float."""
        return self._ranges.calibrated

    @property
    def frozen(self) -> bool:
        """Whether the ranges are frozen."""
        return self._ranges.frozen

    @property
    def scales(self) -> ScaleLearner:
        """The optimizer of learned scales; ``rate`` is its learning rate."""
        return self._ranges.scales

    @property
    def drift(self) -> list[str]:
        """Where the running model differs from the captured one, as messages."""
        return list(self.runtime.mismatches.found.values())

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters."""
        return next(self.model.parameters()).device

    def to(self, device: torch.device) -> None:
        """Move the quantizers to the model's device."""
        for quantizer in chain(self._activations.values(), self.corrections.values()):
            quantizer.to(device)

    def replan(self, settings: Settings | None = None, suggestions: Iterable[str] = ()) -> list[str]:
        """Change what is quantized. Quantizers that stay keep their ranges.

        Args:
            settings: The new recipe; `None` keeps the old one.
            suggestions: Layers to skip because of their sensitivity, all of them, not only new ones.

        Returns:
            Names of the new quantizers, whose ranges are not known yet: calibrate again if there are any.
        """
        self.settings = load_settings(settings) if settings is not None else self.settings
        self.plan = plan_quantization(self.graph, self.settings, suggestions)
        before = dict(self.activations)
        self._activations, self.weights = build_quantizers(self.model, self.capture, self.plan, self.settings, before, self.weights)
        self._ranges.load(self._activations, self.weights, self.settings.training_settings.scale_learning_rate)
        self.to(self.device)
        self._set_corrections({name: correction for name, correction in self.corrections.items() if name in self.weights})
        torch.compiler.reset()
        return [key for key, quantizer in self.activations.items() if before.get(key) is not quantizer]

    def calibrate(self, batches: Iterable[Any], forward: Forward | None = None, only: Iterable[str] | None = None) -> int:
        """Calibrate: find the ranges of the activations from some batches, in evaluation mode and without gradients.

        Args:
            batches: The batches, on the model's device: tensors, tuples of positional arguments, or mappings of keyword arguments.
            forward: ``(model, batch) -> Any``: how to call the model on a batch; by default with the batch's items as its arguments.
            only: Names of the quantizers to calibrate; `None`: all.

        Returns:
            The number of batches.

        Raises:
            CCOError: No batch came, or a weight or an activation is NaN or infinite; the message names the layer.
        """
        if isinstance(batches, Tensor):
            raise CCOError(f"calibrate: expected batches, such as [x], got one tensor of shape {list(batches.shape)}.")
        check_weights(self.model, self.graph)
        forward = forward or call_with
        observed = chosen_quantizers(self.activations, only)
        for quantizer in observed.values():
            quantizer.start_calibration()
        for weight_quantizer in chain.from_iterable(self.weights.values() if only is None else ()):
            weight_quantizer.forget()
        corrects = self.settings.training_settings.bias_correction
        if corrects:
            batches = list(batches)  # they are gone through twice
            self._set_corrections({})
        count, fresh = 0, untrained_norms(self.model)
        as_trained, observing = by_batch_statistics(fresh.values()), self.runtime.doing(Phase.OBSERVE, only=observed.values())
        with self.evaluating(), self.forked_random(), as_trained, observing:
            for batch in batches:
                self.runtime.batch += 1
                forward(self.model, batch)
                count += 1
        finish_calibration(self.model, self.graph, observed, count)
        warn_of_zeros(self.plan, observed)
        warn_of_frozen_ranges(fresh, observed)
        warn_of_evaluation_mode(self.model)
        self._ranges.calibrated = True
        self.runtime.phase = Phase.QUANTIZE
        if corrects:
            with self.evaluating(), self.forked_random(), by_batch_statistics(fresh.values()):
                self._correct_biases(batches, forward)
        torch.compiler.reset()
        return count

    def _correct_biases(self, batches: Iterable[Any], forward: Forward) -> None:
        """Measure what rounding shifts the mean of each layer by, and take it off from now on."""
        shifts = Shifts(self.capture, corrected_channels(self.capture, self.weights))
        for batch in batches:
            with self.forked_random(), self.runtime.doing(Phase.RECORD_FLOAT, shifts.note):
                forward(self.model, batch)
            with self.runtime.doing(Phase.CORRECT, shifts.corrected):
                forward(self.model, batch)
            shifts.end_batch()
        self._set_corrections(shifts.corrections(self.device))

    def _set_corrections(self, corrections: dict[str, BiasCorrection]) -> None:
        self.corrections = corrections
        self.runtime.load(self.plan, self.activations, self.weights, corrections)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode inside the block, without gradients if the model's forward needs none. Ranges are frozen; state that forwards change is restored."""
        self.runtime.frames.need_attached()
        following, self.runtime.following = self.runtime.following, False
        try:
            with evaluating(self.model, self.capture.needs_gradients):
                yield
        finally:
            self.runtime.following = following

    def follow_ranges(self, follow: bool) -> None:
        """Set whether ranges follow forwards that record gradients: those of a training do, not those of a validation that needs gradients (forces)."""
        self.runtime.following = follow

    def freeze_ranges(self) -> None:
        """Freeze all activation ranges."""
        self._ranges.freeze()

    def unfreeze_ranges(self) -> None:
        """Let the ranges follow the activations again, also those that ``auto`` froze."""
        self._ranges.unfreeze()

    def update_ranges(self) -> None:
        """Update the ranges with what was observed in training since their last update; under DDP equally on all ranks.

        On a single process this is automatic: before the first forward after the weights have changed, and before ranges are read. Under DDP call it after
        each step, on all ranks (the callback does).
        """
        self._ranges.move()

    def _forward_starts(self) -> None:
        """Before a forward: quantizers on the model's device, ranges moved on."""
        self._starts += 1
        if self._starts & (self._starts - 1) == 0:  # before the first, second, fourth, eighth … forward: it looks at each module
            self.runtime.mismatches.hooked_late(self.capture.hooked, self.plan)
        self.runtime.forward_starts()
        self._follow_device()
        self._ranges.before_forward()

    def _follow_device(self) -> None:
        """Keep the quantizers where the parameters are: Lightning moves the model to the CPU at the end of a run."""
        device = self.device
        first = next(iter(self._activations.values()), None)
        if device.type != "meta" and (first is None or first.scale.device != device):  # on the meta device a range would be lost
            self.to(device)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Compute in float inside the block, in this thread or asynchronous task only."""
        with self.runtime.doing(Phase.PASS):
            yield

    def measured_layers(self) -> list[str]:
        """Layers with a quantized weight, or with a quantizer on the output, in graph order."""
        return [name for name in self.graph.names if name in self.weights or name in self.activations]

    def forked_random(self) -> AbstractContextManager[None]:
        """Restore the state of the random number generators after the block."""
        return random_apart(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Plan and ranges as plain dicts, strings, numbers and tensors."""
        self._ranges.before_saving()
        return state_of(self.plan, self.activations, self.weights, self.corrections, self._ranges)

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Load the ranges of a state. On an error nothing is changed.

        Returns:
            The differences between the state's plan and this one, as messages; empty if there is none.

        Raises:
            CCOError: The state belongs to another architecture, is of a newer version or damaged; the message names the key.
        """
        check_fits(state, self.graph, self.activations)
        corrections = load_corrections(state, corrected_channels(self.capture, self.weights))
        different_bits, self.uncalibrated = load_ranges(state, self.activations)
        load_weight_scales(state, self.weights)
        if corrections or self.corrections:
            self._set_corrections({name: correction.to(self.device) for name, correction in corrections.items()})
        if state["frozen"]:
            self.freeze_ranges()
        self._ranges.outliers.load(state.get("outliers", ()), self._activations)  # states before version 3 have none
        self._ranges.calibrated = bool(state["calibrated"])
        self.runtime.phase = Phase.QUANTIZE if self.calibrated else Phase.PASS
        torch.compiler.reset()
        return plan_differences(state, self.plan) + different_bits

    @property
    def attached(self) -> bool:
        """Whether the hooks are on the model: not after `remove`, nor after another callback has quantized it."""
        return self.runtime.frames.attached

    def remove(self) -> None:
        """Remove all hooks: the model computes in float again, with its current weights."""
        self.runtime.frames.detach()

    def __repr__(self) -> str:
        state = "frozen" if self.frozen else "calibrated" if self.calibrated else "not calibrated"
        state = state if self.attached else "hooks are off: it computes in float"
        return f"{type(self).__name__}({type(self.model).__name__}, {self.plan.summary}; {state})"
