"""Runs the model once more, for an exporter: where fake-quantization would be, quantize and dequantize operators are written down."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco.export import weight_blocks
from lightning_cco.export.embedding_bags import bag_arguments, is_bag, reduced
from lightning_cco.export.engine_patterns import attention, averages_images, divided, without_bound
from lightning_cco.export.engines import Form
from lightning_cco.export.fold_batch_norm import IntegerWeight
from lightning_cco.export.onnx_passes import NAME
from lightning_cco.export.provenance import noting
from lightning_cco.export.stored import StoredWeights
from lightning_cco.export.weight_blocks import Block
from lightning_cco.graph.call_node import ModuleCall
from lightning_cco.graph.capture import CallSite
from lightning_cco.graph.compiled import mode_stack, restore_modes
from lightning_cco.graph.ops import Category, operation
from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.arguments import replaced
from lightning_cco.quantization.clamp_limits import LIMITS
from lightning_cco.quantization.model import HookedModel
from lightning_cco.quantization.qparams import level_bounds, quant_range
from lightning_cco.quantization.tensor_key import TensorKey


class Emitter:
    """Writes a quantized model's operators while an exporter traces its forward.

    Args:
        quantized: The calibrated model.
        stored: Its weights.
        opset: ONNX opset of the operators.

    Attributes:
        order: Quantizer name of each QuantizeLinear, in the order written.
        modules: Module path of each node of the file, by the node's name.
        layers: Layer of each node of the file that belongs to one, by the node's name.
        reached: The last layer that a forward came to.
        model: The forward that is written.
        reads_shapes: Whether the file computes with the sizes of tensors.
    """

    def __init__(self, quantized: HookedModel, stored: StoredWeights, opset: int = 20) -> None:
        self.quantized, self.stored, self.opset = quantized, stored, opset
        self.order: list[str] = []
        self.reached = ""
        self.reads_shapes = False
        self.modules: dict[str, str] = {}
        self.layers: dict[str, str] = {}
        self.model: nn.Module = quantized.model
        self._formats = {key: _format(quantizer) for key, quantizer in quantized.activations.items()}
        self._sites: dict[tuple[int, str, int], CallSite] = {
            (id(site.node), site.op.kind, site.positions[False]): site for site in quantized.capture.sites.values() if site.visible
        }

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Inside the block an ordinary forward gives the weights as the layers see them."""
        with self._handling(self.stored.collect):
            yield

    @contextmanager
    def emitting(self) -> Iterator[None]:
        """Inside the block a traced forward contains the operators."""
        self.order.clear()
        self.stored.make_blocks()
        with self._handling(self._emit):
            yield

    @contextmanager
    def _handling(self, handle: Callable[..., Any]) -> Iterator[None]:
        frames = self.quantized.runtime.frames

        def find(frame: ModuleCall, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            kind = operation(name).kind
            index = frame.counts.get(kind, 0)
            frame.counts[kind] = index + 1
            site = self._sites.get((id(frame.node), kind, index))
            self.reached = site.layer if site is not None else self.reached
            if site is None:
                return func(*args, **kwargs)
            with noting(site.layer):
                return handle(site, func, args, kwargs)

        modes = mode_stack()
        try:
            with frames.handled_by(find):
                yield
        finally:
            # A trace that fails skips the hooks of the modules it was in; torch.export then takes our mode off for its own and leaves that behind.
            frames.reset()
            restore_modes(modes)

    def _emit(self, site: CallSite, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = site.layer
        if name in self.stored.folded:
            result = args[0]
        elif name in self.stored.blocked and all(isinstance(size, int) for size in args[0].shape[2:]):
            result = self._convolve_blocks(site, args[0])
        else:
            args, kwargs = self._with_inputs(site, args, kwargs)
            if site.op.looks_up:
                args, kwargs = self._with_table(site, args, kwargs)
            if site.op.kind == "batch_norm" and name in self.stored.weights:
                return self._with_outputs(site, args, self._scale_channels(site, args[0] if args else kwargs["input"]))
            if site.op.kind == "embedding" and name in self.stored.weights:
                result = self._embedding(self.stored.weights[name][0], args, kwargs, self.stored.blocks.get(name))
            elif site.op.kind == "embedding_bag" and is_bag(bag_arguments(args, kwargs)):
                result = self._bags(site, bag_arguments(args, kwargs))
            else:
                block = self.stored.blocks.get(name)
                if block is not None and (product := self._block_product(site, block, args, kwargs)) is not None:
                    return self._with_outputs(site, args, product)
                args, kwargs = self._with_weights(site, args, kwargs)
                if site.op.kind == "linear" and self.quantized.plan.rounds(name) and args and args[0].dim() > 2:
                    return self._linear(name, func, args, kwargs)
                limits = self._folded_clamp(site, args, kwargs)
                if limits is not None:
                    return self._with_outputs(site, args, args[0] if args else kwargs["input"], limits)
                if site.op.kind == "scaled_dot_product_attention":
                    func = attention
                if site.op.kind == "avg_pool":
                    func = divided(func)
                result = func(*args, **kwargs)
                if averages_images(site.op.kind, args, kwargs):
                    return self._average(name, args[0], result)
        return self._with_outputs(site, args, result)

    def _linear(self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """A linear layer on rows: engines fuse weight, bias and rounding of a matrix product, not of a product of more dimensions."""
        x = args[0]
        rows = self._round(func(x.reshape(-1, x.shape[-1]), *args[1:], **kwargs), TensorKey(name))
        return rows.reshape(-1, *x.shape[1:-1], rows.shape[-1])

    def _block_product(self, site: CallSite, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """A product with weights in groups, in the form that engines multiply; `None`: the call itself is, with a matrix of weights."""
        if site.op.kind == "linear":
            call = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
            x, bias = call["input"], call.get("bias")
        elif site.op.kind == "addmm" and block.packed is not None and len(args) == 3 and not kwargs:
            bias, x = args[:2]
        elif site.op.kind == "matmul" and block.packed is not None and len(args) == 2:
            x, bias = args[0], None
        else:
            return None
        result = weight_blocks.product(self._symbolic, x if x.dim() > 1 else x[None], block)
        result = result if x.dim() > 1 else result[0]
        return result if bias is None else result + bias

    def _average(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        """The average of each channel, rounded as engines do it: before the shape changes."""
        pooled: Tensor = self._symbolic("GlobalAveragePool", (x,), (*x.shape[:2], 1, 1), x.dtype)
        if self.quantized.plan.rounds(name):
            pooled = self._round(pooled, TensorKey(name))
        return pooled if result.dim() == 4 else pooled.flatten(1)

    def _convolve_blocks(self, site: CallSite, x: Tensor) -> Tensor:
        """A first convolution on blocks of pixels."""
        weight, pads = self.stored.blocked[site.layer]
        n, channels, height, width = x.shape
        blocks = self._symbolic("SpaceToDepth", (x,), (n, 4 * channels, height // 2, width // 2), x.dtype, {"blocksize": 2})
        tensors = [self._round(blocks, self.quantized.plan.reads[site.layer][0]), self._dequantize_weight(weight)]
        if site.layer in self.stored.biases:
            tensors.append(self._bias_value(site))
        kernel = list(weight.integers.shape[2:])
        sizes = (height // 2 + pads[0] + pads[2] - kernel[0] + 1, width // 2 + pads[1] + pads[3] - kernel[1] + 1)
        attributes = {"pads": list(pads), "kernel_shape": kernel}
        return self._symbolic("Conv", tuple(tensors), (n, weight.integers.shape[0], *sizes), x.dtype, attributes)

    def _scale_channels(self, site: CallSite, x: Tensor) -> Tensor:
        """A batch norm that no layer takes in, as a convolution of each channel with one number."""
        (weight,) = self.stored.weights[site.layer]
        kernel = [1] * (x.dim() - 2)
        weight = replace(weight, integers=weight.integers.reshape(*weight.integers.shape, *kernel))
        tensors = (x, self._dequantize_weight(weight), self._bias_value(site))
        return self._symbolic("Conv", tensors, x.shape, x.dtype, {"group": x.shape[1], "kernel_shape": kernel})

    def _with_inputs(self, site: CallSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Quantize what is rounded at its readers: the model's inputs, tensors that an index is made of."""
        for number, key in self.quantized.plan.reads.get(site.layer, {}).items():
            source = site.sources[number]
            if site.in_place and source.slot == (0,):
                continue  # the caller's own tensor, which is written to
            if source.quantizable:
                args, kwargs = replaced(args, kwargs, source.slot, lambda x, key=key: self._round(x, key))  # type: ignore[misc]
        return args, kwargs

    def _with_weights(self, site: CallSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for weight, integers in zip(site.weights, self.stored.weights.get(site.layer, ()), strict=False):
            block = self.stored.blocks.get(site.layer)
            args, kwargs = replaced(args, kwargs, weight.slot, lambda _, w=integers, b=block: self._dequantize_weight(w, b))  # type: ignore[misc]
            if site.layer in self.stored.biases:
                args, kwargs = self._with_bias(site, args, kwargs)
        for weight, operand in zip(site.weights, self.stored.operands.get(site.layer, ()), strict=False):
            if isinstance(operand, IntegerWeight):
                args, kwargs = replaced(args, kwargs, weight.slot, lambda _, w=operand: self._dequantize_weight(w))  # type: ignore[misc]
            else:
                args, kwargs = replaced(args, kwargs, weight.slot, lambda x, s=operand: self._round_operand(x, s, site.layer))  # type: ignore[misc]
        return args, kwargs

    def _with_table(self, site: CallSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The rows of a table are within ``max_norm`` already."""
        args, kwargs = without_bound(args, kwargs)
        table = self.stored.tables.get(site.layer)
        return (args, kwargs) if table is None else replaced(args, kwargs, site.weights[0].slot, lambda _: table)

    def _with_bias(self, site: CallSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        value = self._bias_value(site)
        if len(args) > 2:
            return (*args[:2], value, *args[3:]), kwargs
        return args, {**kwargs, "bias": value}

    def _bias_value(self, site: CallSite) -> Tensor:
        value, scale = self.stored.biases[site.layer]
        if scale is None:
            return value
        return self._symbolic("DequantizeLinear", (value, scale), value.shape, torch.float32, {"axis": 0} if scale.dim() else {})

    def _folded_clamp(self, site: CallSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
        """First and last level of a rounded tensor behind a clamp that rounding does; `None`: the clamp is written as it is."""
        known = LIMITS.get(site.function) if site.op.category is Category.CLAMP else None
        key = TensorKey(site.layer)
        if known is None or not self.stored.engine.wanted(Form.INTEGER_CLIPS) or not self.quantized.plan.rounds(key):
            return None
        quantizer, interval = self.quantized.activations[key], known(args, kwargs)
        if interval is None or quantizer.empty:
            return None
        zero_point = int(quantizer.zero_point)
        low, high = (level - zero_point for level in quant_range(quantizer.num_bits, quantizer.symmetric))
        first, last = level_bounds(float(quantizer.scale), low, high, interval)
        return int(first) + zero_point, int(last) + zero_point

    def _with_outputs(self, site: CallSite, args: tuple[Any, ...], result: Any, limits: tuple[int, int] | None = None) -> Any:
        if isinstance(result, Tensor):
            if not self.quantized.plan.rounds(TensorKey(site.layer)):
                return result
            rounded = self._round(result, TensorKey(site.layer), limits)
            return args[0].copy_(rounded) if site.in_place and site.layer not in self.stored.folded else rounded
        if not isinstance(result, (tuple, list)):
            return result
        items = list(result)
        for output in range(len(items)):
            key = TensorKey(site.layer, output)
            if self.quantized.plan.rounds(key):
                items[output] = self._round(items[output], key)
        return type(result)(*items) if hasattr(result, "_fields") else type(result)(items)

    def _round(self, x: Tensor, key: TensorKey, limits: tuple[int, int] | None = None) -> Tensor:
        """QuantizeLinear and DequantizeLinear; formats of fewer than 8 bits are stored in 8 with a narrower range.

        Args:
            x: What is rounded.
            key: Name of its quantizer.
            limits: First and last level, if a clamp narrows the format.
        """
        if self.quantized.activations[key].empty:
            return x
        scale, zero_point, levels = self._formats[key]
        levels = limits or levels
        if levels is None or self.stored.engine.wanted(Form.INTEGER_CLIPS):
            return self._pair(x, scale, zero_point, key, levels)
        low, high = ((level - int(zero_point)) * scale for level in levels)
        return self._pair(x.clamp(float(low), float(high)), scale, zero_point, key)

    def _round_operand(self, x: Tensor, scale: Tensor, layer: str) -> Tensor:
        zero_point, dtype = self.stored.operand_format
        return self._pair(x, scale, torch.tensor(zero_point, dtype=dtype, device=scale.device), f"{layer}.operand")

    def _pair(self, x: Tensor, scale: Tensor, zero_point: Tensor, name: str, limits: tuple[int, int] | None = None) -> Tensor:
        self.order.append(name)
        levels = self._symbolic("QuantizeLinear", (x, scale, zero_point), x.shape, zero_point.dtype, name=name)
        info = torch.iinfo(zero_point.dtype)
        if limits is not None and (limits[0] > info.min or limits[1] < info.max):
            bounds = (torch.tensor(level, dtype=zero_point.dtype, device=scale.device) for level in limits)
            levels = self._symbolic("Clip", (levels, *bounds), x.shape, zero_point.dtype)
        return self._symbolic("DequantizeLinear", (levels, scale, zero_point), x.shape, torch.float32)

    def _dequantize_weight(self, weight: IntegerWeight, block: Block | None = None) -> Tensor:
        if block is not None:
            matrix = weight_blocks.dequantized(self._symbolic, block)
            return matrix if weight.axis == 0 or block.looked_up else matrix.t()
        attributes = {} if weight.axis is None else {"axis": weight.axis}
        zero_point = torch.full(weight.scale.shape, weight.zero_point, dtype=weight.integers.dtype, device=weight.scale.device)
        return self._symbolic(
            "DequantizeLinear", (weight.integers, weight.scale, zero_point), weight.integers.shape, torch.float32, attributes
        )

    def _embedding(self, weight: IntegerWeight, args: tuple[Any, ...], kwargs: dict[str, Any], block: Block | None) -> Tensor:
        """Look integers up, then scale: dequantizing the whole table first would cost its float size again."""
        indices = args[0] if args else kwargs["input"]
        if block is not None:
            return weight_blocks.rows(self._symbolic, block, indices)
        scale = weight.scale.reshape(-1, 1) if weight.scale.dim() else weight.scale.expand(weight.integers.shape[0], 1)
        return F.embedding(indices, weight.integers).to(torch.float32) * F.embedding(indices, scale)

    def _bags(self, site: CallSite, call: dict[str, Any]) -> Tensor:
        """Look the rows of all bags up, then reduce them."""
        stored = self.stored.weights.get(site.layer)
        rows = (
            self._embedding(stored[0], (call["input"],), {}, self.stored.blocks.get(site.layer))
            if stored
            else F.embedding(call["input"], call["weight"])
        )
        return reduced(rows, call)

    def _symbolic(
        self,
        operator: str,
        inputs: tuple[Tensor, ...],
        shape: Any,
        dtype: torch.dtype,
        attributes: dict[str, Any] | None = None,
        name: str = "",
    ) -> Tensor:
        names = {NAME: name} if name else None
        result: Tensor = torch.onnx.ops.symbolic(
            operator,
            inputs,
            dict(attributes or {}),
            dtype=dtype,
            shape=shape,
            version=1 if "::" in operator else self.opset,
            metadata_props=names,
        )
        return result


def _format(quantizer: ActivationQuantizer) -> tuple[Tensor, Tensor, tuple[int, int] | None]:
    """Scale, zero point in its storage type, and the first and last level of a format of fewer than 8 bits."""
    levels = quant_range(quantizer.num_bits, quantizer.symmetric) if quantizer.num_bits < 8 else None
    zero_point = quantizer.zero_point.detach().to(torch.int8 if quantizer.symmetric else torch.uint8)
    return quantizer.scale.detach().clone(), zero_point, levels
