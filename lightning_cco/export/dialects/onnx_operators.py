"""ONNX: symbolic operators in a traced program, which the exporter takes over as they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_cco.export import weight_blocks
from lightning_cco.export.dialects.dialect import Format
from lightning_cco.export.fold_batch_norm import IntegerWeight
from lightning_cco.export.onnx_passes import NAME
from lightning_cco.export.weight_blocks import Block


class OnnxDialect:
    """Writes QuantizeLinear and DequantizeLinear.

    Args:
        opset: Opset of the operators.
    """

    products_on_rows = True

    def __init__(self, opset: int = 20) -> None:
        self.opset = opset
        self._zero_points: dict[int, tuple[IntegerWeight, Tensor]] = {}

    def prepare(self, weights: Iterable[IntegerWeight]) -> None:
        """Zero points as tensors: those that a trace makes are constants only in a graph that the exporter optimizes."""
        self._zero_points = {id(weight): (weight, _zero_points(weight)) for weight in weights}

    def pair(self, x: Tensor, format: Format, name: str, limits: tuple[int, int] | None = None) -> Tensor:
        """QuantizeLinear and DequantizeLinear, with a Clip of integers between them where the type has more levels."""
        scale, zero_point = format.scale, format.zero_point
        levels = self.write("QuantizeLinear", (x, scale, zero_point), x.shape, zero_point.dtype, name=name)
        info = torch.iinfo(zero_point.dtype)
        if limits is not None and (limits[0] > info.min or limits[1] < info.max):
            bounds = (torch.tensor(level, dtype=zero_point.dtype, device=scale.device) for level in limits)
            levels = self.write("Clip", (levels, *bounds), x.shape, zero_point.dtype)
        return self.write("DequantizeLinear", (levels, scale, zero_point), x.shape, torch.float32)

    def weight(self, weight: IntegerWeight, block: Block | None) -> Tensor:
        """DequantizeLinear of a constant."""
        if block is not None:
            matrix = weight_blocks.dequantized(self.write, block)
            return matrix if weight.axis == 0 or block.looked_up else matrix.t()
        attributes = {} if weight.axis is None else {"axis": weight.axis}
        _, zero_point = self._zero_points[id(weight)]
        return self.write("DequantizeLinear", (weight.integers, weight.scale, zero_point), weight.integers.shape, torch.float32, attributes)

    def bias(self, value: Tensor, scale: Tensor | None) -> Tensor:
        """DequantizeLinear of a constant, or the floats."""
        if scale is None:
            return value
        return self.write("DequantizeLinear", (value, scale), value.shape, torch.float32, {"axis": 0} if scale.dim() else {})

    def average(self, x: Tensor) -> Tensor:
        """GlobalAveragePool, which engines have in INT8; not so ReduceMean."""
        return self.write("GlobalAveragePool", (x,), (*x.shape[:2], 1, 1), x.dtype)

    def pixel_blocks(self, x: Tensor) -> Tensor:
        """SpaceToDepth."""
        n, channels, height, width = x.shape
        return self.write("SpaceToDepth", (x,), (n, 4 * channels, height // 2, width // 2), x.dtype, {"blocksize": 2})

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, pads: tuple[int, int, int, int] | None) -> Tensor:
        """Conv."""
        kernel = list(weight.shape[2:])
        sizes: tuple[Any, ...] = tuple(x.shape[2:])
        attributes: dict[str, Any] = {"kernel_shape": kernel} | ({"group": groups} if groups > 1 else {})
        if pads is not None:
            attributes["pads"] = list(pads)
            sizes = tuple(size + pads[i] + pads[i + 2] - kernel[i] + 1 for i, size in enumerate(sizes))
        inputs = (x, weight) if bias is None else (x, weight, bias)
        return self.write("Conv", inputs, (x.shape[0], weight.shape[0], *sizes), x.dtype, attributes)

    def product(self, x: Tensor, block: Block) -> Tensor | None:
        """A MatMul with blocks that are dequantized, or MatMulNBits."""
        return weight_blocks.product(self.write, x, block)

    def rows(self, block: Block, indices: Tensor) -> Tensor:
        """Gather of integers and scales, or GatherBlockQuantized."""
        return weight_blocks.rows(self.write, block, indices)

    def write(
        self,
        operator: str,
        inputs: tuple[Tensor, ...],
        shape: Any,
        dtype: torch.dtype,
        attributes: dict[str, Any] | None = None,
        name: str = "",
    ) -> Tensor:
        """One operator.

        Args:
            operator: ``Name``, or ``domain::Name``.
            inputs: Tensors.
            shape: Of the result.
            dtype: Of the result.
            attributes: Its attributes.
            name: Of the quantizer, if it is a QuantizeLinear.
        """
        result: Tensor = torch.onnx.ops.symbolic(
            operator,
            inputs,
            dict(attributes or {}),
            dtype=dtype,
            shape=shape,
            version=1 if "::" in operator else self.opset,
            metadata_props={NAME: name} if name else None,
        )
        return result


def _zero_points(weight: IntegerWeight) -> Tensor:
    """As many as there are scales."""
    return torch.full(weight.scale.shape, weight.zero_point, dtype=weight.integers.dtype, device=weight.scale.device)
