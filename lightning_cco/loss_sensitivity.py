"""Loss sensitivity: how much the loss is expected to rise if one weight, or one activation, is rounded to so many bits.

A rounding changes a layer's output on sample i by ``e_i``. To second order the loss then rises by ``½ · E[(g_i · e_i)²]``, where ``g_i`` is the gradient of
the sample's loss: the squared error weighted by the squared gradient (the Fisher information). The product runs over the whole output of a sample before
it is squared, not value by value: what rounding does to a weight it does at each pixel alike, and such errors add up. For the output of a linear
operation this is ``½ · ΔWᵀ F ΔW`` with the full Fisher matrix of the layer's weight, from one backward for all layers and numbers of bits together.

The first order, ``E[g_i · e_i]``, is measured too, but not added: at the end of a training it vanishes, and on a few batches it is specific to these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_cco.compat.metrics import syncs
from lightning_cco.quantization.plan import LayerDecision, QuantizationPlan
from lightning_cco.quantization.tensor_key import TensorKey

WEIGHTS_BITS = (2, 3, 4, 8)
ACTIVATIONS_BITS = (4, 8)
Part = Literal["weights", "activations"]
Rounding = tuple[Part, str, int]
"""What is rounded: a layer's weights or a tensor, by name, and to how many bits."""


@dataclass(frozen=True)
class LossSensitivityReport:
    """The expected rise of the loss for each weight, each activation, and each number of bits.

    Attributes:
        weights: By layer and bits. In float nothing rises.
        activations: By the name of a tensor's quantizer and bits.
        loss: What the loss is: ``loss`` of the training step, or ``divergence`` from the float model's own outputs, where there is no loss.
        num_batches: Batches measured, over all processes.
        slopes: The first order, by what is rounded.
    """

    weights: dict[str, dict[int, float]]
    activations: dict[str, dict[int, float]]
    loss: str
    num_batches: int
    slopes: dict[Rounding, float]

    def rise_of(self, name: str, decision: LayerDecision) -> float | None:
        """The expected rise for one layer as it is planned: its weights and its output; `None` if nothing of it was measured."""
        parts = (
            self.weights.get(name, {}).get(decision.weights_num_bits or 0),
            self.activations.get(name, {}).get(decision.activations_num_bits or 0),
            self.activations.get(TensorKey(name, as_read=True), {}).get(decision.read_num_bits or 0),
        )
        known = [part for part in parts if part is not None]
        return sum(known) if known else None

    def rises(self, plan: QuantizationPlan) -> dict[str, float]:
        """The expected rise for each measured layer of a plan, in graph order."""
        found = ((name, self.rise_of(name, plan.decisions[name])) for name in plan.graph.names)
        return {name: rise for name, rise in found if rise is not None}

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, with numbers of bits as text, as JSON has them."""
        parts: dict[str, Any] = {
            part: {name: {str(b): rise for b, rise in by.items()} for name, by in getattr(self, part).items()} for part in _PARTS
        }
        slopes = [[*rounding, slope] for rounding, slope in self.slopes.items()]
        return {**parts, "loss": self.loss, "num_batches": self.num_batches, "slopes": slopes}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> LossSensitivityReport:
        """The report of what `to_dict` returned."""
        parts = {part: {name: {int(b): float(rise) for b, rise in by.items()} for name, by in state[part].items()} for part in _PARTS}
        slopes = {(part, name, int(bits)): float(slope) for part, name, bits, slope in state["slopes"]}
        return cls(parts["weights"], parts["activations"], state["loss"], state["num_batches"], slopes)


_PARTS: tuple[Part, Part] = ("weights", "activations")


def loss_changes(error: Tensor, gradient: Tensor, terms: int) -> Tensor:
    """What an error of a layer's output does to the mean loss of a batch, to first and to second order.

    Args:
        error: Quantized less float output; its first axis counts samples.
        gradient: Gradient of the mean loss with respect to the float output, the same shape.
        terms: Of how many terms the loss is the mean: samples, tokens, pixels.

    Returns:
        float64 of 2: ``Σ g·e`` and ``½ Σ (g·e)²`` with each sample's own gradient, per term.

    >>> loss_changes(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[0.5, 0.0], [0.0, 1.0]]), terms=2).tolist()
    [1.5, 1.25]
    """
    rows = (error.float() * gradient.float()).reshape(error.shape[0] if error.dim() else 1, -1).sum(1, dtype=torch.float64)
    return torch.stack([rows.sum(), rows.square().sum() * (0.5 * terms)])


class LossSensitivity(Metric):
    """The expected rise of the loss by one rounding, as a torchmetrics metric.

    >>> metric = LossSensitivity()
    >>> metric.update(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [0.0]]), torch.tensor([[0.5], [0.25]]))
    >>> metric.compute()
    tensor(0.5000, dtype=torch.float64)
    """

    changes: Tensor
    count: Tensor
    higher_is_better = False
    is_differentiable = False
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("changes", torch.zeros(2, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")

    def update(self, quantized: Tensor, reference: Tensor, gradient: Tensor) -> None:
        """Add one batch.

        Args:
            quantized: The quantized layer's output; its first axis counts samples.
            reference: The float layer's output, the same shape.
            gradient: Gradient of the batch's mean loss with respect to ``reference``.
        """
        self.changes += loss_changes(quantized.detach() - reference.detach(), gradient.detach(), len(reference))
        self.count += 1

    def compute(self) -> Tensor:
        """The expected rise, a 0-d float64 tensor."""
        return self.changes[1] / self.count.clamp(min=1)


class LossSensitivities(Metric):
    """The loss sensitivity of all roundings at once: one state, one reduction.

    Args:
        roundings: What is rounded.
    """

    changes: Tensor
    batches: Tensor
    full_state_update = False

    def __init__(self, roundings: Iterable[Rounding], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.roundings = list(roundings)
        self._number = {rounding: number for number, rounding in enumerate(self.roundings)}
        # First order, second order, and whether it ever came.
        self.add_state("changes", torch.zeros(len(self.roundings), 3, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("batches", torch.zeros((), dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")

    def start_batch(self) -> None:
        """Count a batch."""
        self.batches += 1

    def update(self, rounding: Rounding, error: Tensor, gradient: Tensor, terms: int) -> None:
        """Add what one rounding changes on one batch; see `loss_changes`."""
        number = self._number.get(rounding)
        if number is not None:
            self.changes[number, :2] += loss_changes(error, gradient, terms).to(self.changes.device)
            self.changes[number, 2] += 1

    def compute(self) -> Tensor:
        """The expected rise by each rounding, float64."""
        return self.changes[:, 1] / self.batches.clamp(min=1)

    def unmeasured(self) -> list[Rounding]:
        """What never ran in this process, or without a gradient."""
        return [rounding for rounding, count in zip(self.roundings, self.changes[:, 2].tolist(), strict=True) if not count]

    def report(self, loss: str) -> LossSensitivityReport:
        """The report, summed over processes. What never ran is left out.

        Args:
            loss: ``loss`` or ``divergence``.
        """
        with self.sync_context(should_sync=syncs(self) and torch.distributed.is_available() and torch.distributed.is_initialized()):
            changes, batches = self.changes.cpu().tolist(), int(self.batches)
        found: dict[Part, dict[str, dict[int, float]]] = {"weights": {}, "activations": {}}
        slopes: dict[Rounding, float] = {}
        for rounding, (first, second, count) in zip(self.roundings, changes, strict=True):
            if count:
                part, name, bits = rounding
                found[part].setdefault(name, {})[bits] = second / max(1, batches)
                slopes[rounding] = first / max(1, batches)
        return LossSensitivityReport(found["weights"], found["activations"], loss, batches, slopes)


def roundings_of(
    plan: QuantizationPlan,
    layers: Iterable[str],
    tensors: Mapping[TensorKey, int],
    weights_bits: Sequence[int],
    activations_bits: Sequence[int],
) -> list[Rounding]:
    """All that is measured of a plan: each number of bits asked for, and the plan's own.

    Args:
        plan: The plan.
        layers: Layers with quantized weights.
        tensors: Bits of each quantized tensor.
        weights_bits: Numbers of bits to try for weights.
        activations_bits: Numbers of bits to try for activations.
    """
    found: list[Rounding] = []
    for name in layers:
        own = plan.decisions[name].weights_num_bits
        found += [("weights", name, bits) for bits in sorted({*weights_bits, *([own] if own is not None else [])})]
    for key, own in tensors.items():
        found += [("activations", str(key), bits) for bits in sorted({*activations_bits, own})]
    return found
