"""The optimizer of learned scales: stochastic gradient descent with momentum, relative to each scale, so that none ever becomes 0 or negative."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.learned_quantizers import LearnedActivationQuantizer, LearnedWeightQuantizer
from lightning_cco.quantization.range_updates import world_size
from lightning_cco.quantization.weight_quantizer import WeightQuantizer

_MOMENTUM = 0.9
_LARGEST_STEP = 0.25
"""No step makes a scale larger or smaller by more than a quarter."""


class ScaleLearner:
    """Moves the learned scales of a model after each step of the weights.

    A scale s becomes ``s * exp(-rate * v)``, where v is the momentum of ``gradient / s``: to first order the step of stochastic gradient descent.

    Args:
        activations: All quantizers of activations.
        weights: All quantizers of weights.
        rate: Learning rate.
    """

    def __init__(self, activations: Iterable[ActivationQuantizer], weights: Iterable[Sequence[WeightQuantizer]], rate: float) -> None:
        self.rate = rate
        self.activations = [quantizer for quantizer in activations if isinstance(quantizer, LearnedActivationQuantizer)]
        every = [quantizer for quantizers in weights for quantizer in quantizers if isinstance(quantizer, LearnedWeightQuantizer)]
        self.weights = list(dict.fromkeys(every))

    def __bool__(self) -> bool:
        return bool(self.activations or self.weights)

    def forget_gradients(self) -> None:
        """Drop the gradients that have come since the scales last moved."""
        for quantizer in (*self.activations, *self.weights):
            if quantizer.probe is not None:
                quantizer.probe.grad = None

    @torch.no_grad()
    def move(self) -> None:
        """One step along the gradients that have come since the last; under DDP along their mean over all ranks. Those that are not finite move nothing."""
        weights = [quantizer for quantizer in self.weights if quantizer.scales is not None]
        probes: list[Tensor] = [quantizer.probe for quantizer in self.activations]
        probes += [quantizer.probe for quantizer in weights if quantizer.probe is not None]
        if not probes or (world_size() == 1 and all(probe.grad is None for probe in probes)):
            return
        device = probes[0].device
        gradients = [_flat(probe, device) for probe in probes]
        sizes = [len(gradient) for gradient in gradients]
        came = torch.ones(len(probes), device=device)  # made on the device: sending it there would wait for it
        for number, probe in enumerate(probes):
            if probe.grad is None:
                came[number].zero_()
        gradient = torch.cat(gradients)
        if world_size() > 1:
            shared = torch.cat([gradient, came])
            dist.all_reduce(shared)
            gradient, came = shared[: len(gradient)] / world_size(), shared[len(gradient) :]
        moves = torch.cat([flag.expand(size) for flag, size in zip((came > 0).unsqueeze(1).unbind(), sizes, strict=True)])
        scale = torch.cat([*(q.scale.expand(2) for q in self.activations), *(_values(q.scales).to(device) for q in weights)])
        velocity = torch.cat([*(q.velocity for q in self.activations), *(_values(q.velocity).to(device) for q in weights)])
        relative = gradient / scale
        moves &= relative.isfinite()
        velocity = torch.where(moves, _MOMENTUM * velocity + relative.nan_to_num(), velocity)
        step = torch.where(moves, (self.rate * velocity).clamp(-_LARGEST_STEP, _LARGEST_STEP), torch.zeros_like(velocity))
        moved = scale * torch.exp(-step)
        self._write(weights, sizes, velocity, step, moved)
        self.forget_gradients()

    def _write(
        self, weights: Sequence[LearnedWeightQuantizer], sizes: Sequence[int], velocity: Tensor, step: Tensor, moved: Tensor
    ) -> None:
        parts = list(zip(*(torch.split(values, list(sizes)) for values in (velocity, step, moved)), strict=True))
        for activation, (own_velocity, own_step, own_scale) in zip(self.activations, parts, strict=False):
            activation.velocity.copy_(own_velocity)
            if activation.has_offset:
                activation.offset.sub_(own_step[1] * activation.scale)
            activation.scale.copy_(own_scale[0])
            activation.learned()
        for weight, (own_velocity, _, own_scale) in zip(weights, parts[len(self.activations) :], strict=True):
            assert weight.scales is not None
            assert weight.velocity is not None
            weight.velocity.copy_(own_velocity.view_as(weight.velocity))
            weight.scales.copy_(own_scale.view_as(weight.scales))
            weight.learned()


def _flat(probe: Tensor, device: torch.device) -> Tensor:
    gradient = probe.grad if probe.grad is not None else torch.zeros_like(probe)
    return gradient.detach().reshape(-1).to(device)


def _values(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.reshape(-1)
