"""The measured rise of a loss by one rounding alone: what loss sensitivities are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import QuantizedModel, quantize
from lightning_cco.loss_sensitivity import Rounding
from lightning_cco.quantization.weight_quantizer import WeightQuantizer

WHOLE: dict[str, Any] = {"skip_tail_quantization": False}
Batch = tuple[Tensor, Tensor]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy over the last axis of the model's output."""
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def images(count: int = 1024) -> Batch:
    """Ten patterns under noise, as images of 8 × 8."""
    generator = torch.Generator().manual_seed(5)
    patterns = torch.randn(10, 1, 8, 8, generator=generator)
    classes = torch.randint(0, 10, (count,), generator=generator)
    return patterns[classes] + 1.6 * torch.randn(count, 1, 8, 8, generator=generator), classes


def texts(count: int = 1024) -> Batch:
    """Sequences of twelve tokens, of which each output is a function of two."""
    tokens = torch.randint(0, 20, (count, 12), generator=torch.Generator().manual_seed(5))
    return tokens, (tokens + 3 * tokens.roll(1, 1)) % 20


def trained(network: type[nn.Module], data: Batch, steps: int = 150) -> nn.Module:
    """A network at the end of a training, the last part of it in evaluation mode, since that is where its loss is measured."""
    torch.manual_seed(0)
    model = network().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        if step == steps * 3 // 5:
            model.eval()
        chosen = torch.randint(0, len(data[0]), (128,))
        optimizer.zero_grad()
        loss_of(model, (data[0][chosen], data[1][chosen])).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def quantized(model: nn.Module, batches: Sequence[Batch], activations_num_bits: int = 8) -> QuantizedModel:
    """The whole model hooked and calibrated, all of its activations at so many bits: a rule, since the settings for all leave some at 8."""
    rules = [{"match": "*", "activations_num_bits": activations_num_bits}] if activations_num_bits != 8 else []
    found = quantize(model, {"global_quantization_settings": WHOLE, "layer_settings": rules}, (batches[0][0][:4],))
    found.calibrate([[inputs] for inputs, _ in batches])
    return found


class _Float(nn.Module):
    """In the place of a quantizer: rounds nothing."""

    empty = False

    def forward(self, x: Tensor, *args: Any, clamp: tuple[float, float] | None = None, **kwargs: Any) -> Tensor:
        return x if clamp is None else F.hardtanh(x, *clamp)


def measured_rises(make: Callable[[int], QuantizedModel], batches: Sequence[Batch], weights_bits: Sequence[int]) -> dict[Rounding, float]:
    """How much the mean loss rises by each rounding alone.

    Args:
        make: A model that is calibrated at so many bits of activations.
        batches: What it is measured on.
        weights_bits: Bits of weights to measure.
    """

    def loss(model: nn.Module) -> float:
        with torch.no_grad():
            return sum(float(loss_of(model, batch)) for batch in batches) / len(batches)

    found: dict[Rounding, float] = {}
    for bits in (8, 4):
        hooked = make(bits)
        plan, activations, weights = hooked.plan, hooked.activations, hooked.weights
        no_activations: dict[Any, Any] = {key: _Float() for key in activations}
        no_weights: dict[Any, Any] = {name: [_Float() for _ in its] for name, its in weights.items()}
        with hooked.disabled():
            before = loss(hooked.model)
        for name in weights if bits == 8 else ():
            for tried in weights_bits:
                rounded = {**no_weights, name: [WeightQuantizer(tried, weight.axis, "auto") for weight in weights[name]]}
                hooked.runtime.load(plan, no_activations, rounded, {})
                found["weights", name, tried] = loss(hooked.model) - before
        for key, quantizer in activations.items():
            hooked.runtime.load(plan, {**no_activations, key: quantizer}, no_weights, {})
            assert quantizer.num_bits == bits, (key, quantizer.num_bits)
            found["activations", str(key), bits] = loss(hooked.model) - before
        hooked.remove()
    return found
