"""Compares each rounded tensor of a file with the fake-quantized model's, layer by layer: each is computed from what the engine's layer read.

Compared from end to end, harmless roundings that fall the other way add up from layer to layer. So at each quantizer its levels are compared with the
engine's integers, and the forward goes on from the engine's: a layer that is right is then a step off where a value lies almost in the middle between two
levels, and one that is wrong is the only one with large differences. Values in the middle of two levels may be rounded to either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_cco.export.dynamic_reads import SUFFIX
from lightning_cco.export.ort_session import QuantizeNode, operand_name
from lightning_cco.quantization.dynamic_activations import DynamicQuantizer
from lightning_cco.quantization.model import HookedModel
from lightning_cco.quantization.sites import dynamic_quantizers

_MIDDLE = 1e-3
"""How near to the middle between two levels, in steps, a value may go either way: sums of tensors whose scales are half of the result's lie there."""
Arrays = Mapping[str, "np.ndarray[Any, Any]"]


@dataclass
class Steps:
    """Differences of one tensor in steps of its scale, added up over batches."""

    largest: float = 0.0
    total: float = 0.0
    far: int = 0
    count: int = 0

    def add(self, steps: Tensor) -> None:
        """Take further differences in."""
        if steps.numel():
            self.largest = max(self.largest, float(steps.max()))
            self.total += float(steps.double().sum())
            self.far += int((steps > 1.5).sum())
            self.count += steps.numel()


class LocalRun:
    """Forwards of a fake-quantized model that go on from an engine's rounded tensors.

    Args:
        quantized: The model.
        rounded: Quantize nodes of the file by quantizer name.

    Attributes:
        steps: Differences by quantizer name.
        weights: What each weight quantizer was given and gave, by layer and number.
        of_no_output: Quantizers of tensors that no output depends on, so that the file leaves them out.
    """

    def __init__(self, quantized: HookedModel, rounded: Mapping[str, list[QuantizeNode]]) -> None:
        self.quantized, self.rounded = quantized, rounded
        self.steps: dict[str, Steps] = {}
        self.weights: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        graph = quantized.graph
        read = graph.ancestors([layer.name for layer in graph if layer.kind == "output"])
        self.of_no_output = [key for key in quantized.activations if key.layer not in read and key not in rounded]
        self._unlike: dict[str, str] = {}
        self._ties: Tensor | None = None
        self._merged = [key for key in quantized.activations if key not in rounded]
        self._taken: list[tuple[Tensor, QuantizeNode]] = []

    @contextmanager
    def going_on_from(self, arrays: Arrays) -> Iterator[None]:
        """Inside the block each quantizer compares its result with the engine's, and gives the engine's.

        Args:
            arrays: The engine's integers by tensor name.
        """
        handles = []
        self._taken.clear()
        try:
            for key, quantizer in self.quantized.activations.items():
                handles.append(quantizer.register_forward_pre_hook(self._find_ties))
                handles.append(quantizer.register_forward_hook(self._activation_hook(key, arrays)))
            for layer, dynamic in dynamic_quantizers(self.quantized.capture).items():
                handles.append(dynamic.register_forward_pre_hook(self._read_hook(f"{layer}{SUFFIX}", arrays)))
            for layer, quantizers in self.quantized.weights.items():
                for number, weight_quantizer in enumerate(quantizers):
                    handles.append(weight_quantizer.register_forward_hook(self._weight_hook(layer, number, arrays)))
            yield
        finally:
            self._taken.clear()
            for handle in handles:
                handle.remove()

    def uncompared(self) -> dict[str, str]:
        """Quantizers whose tensors could not be compared, and why; without those that have no range, since nothing came there: they round nothing."""
        missing: dict[str, str] = {}
        for key, quantizer in self.quantized.activations.items():
            if key in self.of_no_output:
                continue
            if key in self._unlike:
                missing[key] = self._unlike[key]
            elif key not in self.steps and not quantizer.empty:
                missing[key] = "no batch of the check reached it" if key in self.rounded else "the file does not round it"
        return missing

    def _find_ties(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Note which values lie in the middle between two levels; before they are rounded, which may be done in place."""
        assert isinstance(module.scale, Tensor)
        self._ties = _in_the_middle(args[0].detach().float().cpu() / float(module.scale))

    def _activation_hook(self, key: str, arrays: Arrays) -> Any:
        calls = 0
        rounded = self.rounded.get(key, [])

        def hook(module: nn.Module, _: Any, output: Tensor) -> None:
            nonlocal calls
            number, calls = calls, calls + 1
            # Each reader of an input rounds it by itself, here as in the file, unless the exporter took two of them for one.
            entries = [*rounded[number : number + 1], *rounded] or self._same_as(output)
            if not entries:
                return
            for entry in entries:
                levels = _arranged(arrays[entry.tensor], output.shape)
                if levels is not None:
                    break
            else:
                shapes = ", ".join(str(tuple(arrays[entry.tensor].shape)) for entry in rounded)
                self._unlike[key] = f"of shape {tuple(output.shape)} in the model, {shapes} in the file"
                return
            levels = levels.to(torch.float32).sub_(entry.zero_point)
            assert isinstance(module.scale, Tensor)
            if self._merged:
                self._taken.append((output.detach().clone(), entry))
            self._compare(key, output.detach().float().cpu() / float(module.scale), levels, self._ties)
            # In place: whoever overwrites its argument goes on with the argument.
            output.copy_(levels.mul_(entry.scale))

        return hook

    def _same_as(self, output: Tensor) -> list[QuantizeNode]:
        """What the file holds instead of a tensor that is computed twice, as by a module called again on the same: the exporter writes it once."""
        return [entry for other, entry in self._taken if other.shape == output.shape and torch.equal(other, output)]

    def _read_hook(self, key: str, arrays: Arrays) -> Any:
        calls = 0
        read = self.rounded.get(key, [])

        def hook(module: DynamicQuantizer, args: tuple[Any, ...]) -> Any:
            nonlocal calls
            number, calls = calls, calls + 1
            ours = args[0].detach()
            theirs = _arranged(arrays[read[number].tensor], ours.shape) if number < len(read) else None
            if theirs is None:
                return None
            steps = module.steps(theirs)
            levels = ours.float().cpu() / steps
            self._compare(key, levels, (theirs / steps).round_(), _in_the_middle(levels))
            return (theirs.to(args[0]),)

        return hook

    def _weight_hook(self, layer: str, number: int, arrays: Arrays) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
            self.weights[layer, number] = args[0].detach(), output.detach()
            name = operand_name(layer, number)
            rounded = self.rounded.get(name, [])
            for entry in rounded:  # computed from a parameter (a class token expanded to the batch): rounded in the file, by the same scale
                levels = _arranged(arrays[entry.tensor], output.shape)
                if levels is None:
                    continue
                scale = float(module.scale(args[0]))
                self._compare(name, output.detach().float().cpu() / scale, levels.to(torch.float32).sub_(entry.zero_point))
                return

        return hook

    def _compare(self, key: str, ours: Tensor, levels: Tensor, ties: Tensor | None = None) -> None:
        steps = ours.round_().sub_(levels).abs_()
        if ties is not None and ties.shape == steps.shape:
            steps.masked_fill_(ties & (steps <= 1), 0.0)
        if not torch.isfinite(steps).all():
            steps = steps.nan_to_num_(nan=0.0, posinf=torch.inf)  # what is not a number has no level
        self.steps.setdefault(key, Steps()).add(steps)


def _in_the_middle(levels: Tensor) -> Tensor:
    return (levels - levels.floor()).sub_(0.5).abs_() < _MIDDLE


def _arranged(array: np.ndarray[Any, Any], shape: torch.Size) -> Tensor | None:
    """The engine's integers in the model's shape, if they are the same values: the file may round rows, averages before a flatten, or blocks of pixels."""
    if array.size != shape.numel():
        return None
    levels = torch.from_numpy(array)
    if array.ndim == len(shape) == 4 and array.shape != tuple(shape) and array.shape[1] == 4 * shape[1]:
        n, channels, height, width = shape
        blocks = levels.reshape(n, 2, 2, channels, height // 2, width // 2)
        return blocks.permute(0, 3, 4, 1, 5, 2).reshape(shape)
    return levels.reshape(shape)
