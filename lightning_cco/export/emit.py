"""Runs the model once more, for an exporter: where fake-quantization would be, quantize and dequantize operators are written down."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco.export.fold import IntegerWeight, integer_weight
from lightning_cco.export.forms import attention, averages_images, blocked_convolution
from lightning_cco.graph.capture import Site
from lightning_cco.graph.compiled import mode_stack, restore_modes
from lightning_cco.graph.frames import Frame
from lightning_cco.graph.ops import Category, operation
from lightning_cco.quantization.fake_quantize import quant_range, weight_scale
from lightning_cco.quantization.model import QuantizedModel
from lightning_cco.quantization.quantizer import ActivationQuantizer
from lightning_cco.quantization.slots import at, replaced
from lightning_cco.quantization.targets import TARGETS

_BIASED = ("conv", "conv_transpose", "linear")


class Emitter:
    """Writes a quantized model's operators while an exporter traces its forward.

    Args:
        quantized: The calibrated model.
        opset: ONNX opset of the operators.

    Attributes:
        order: Quantizer name of each QuantizeLinear, in the order written.
        modules: Module path of each node of the file, by the node's name.
        reached: The last layer that a forward came to.
        folded: Names of the batch norms that went into the weights before them.
    """

    def __init__(self, quantized: QuantizedModel, opset: int = 20) -> None:
        self.quantized, self.opset = quantized, opset
        self.order: list[str] = []
        self.reached = ""
        self.modules: dict[str, str] = {}
        self.weights: dict[str, list[IntegerWeight]] = {}
        self.biases: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.operands: dict[str, list[IntegerWeight | Tensor]] = {}
        self.blocked: dict[str, tuple[IntegerWeight, tuple[int, int, int, int]]] = {}
        self.folded: set[str] = set()
        self.target = TARGETS[quantized.settings.deployment_settings.target_framework]
        self._formats = {key: _format(quantizer) for key, quantizer in quantized.activations.items()}
        self._sites: dict[tuple[int, str, int], Site] = {
            (id(site.node), site.op.kind, site.positions[False]): site for site in quantized.capture.sites.values() if site.visible
        }

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Inside the block an ordinary forward gives the weights as the layers see them (parametrized, sliced, tied)."""
        with self._handling(self._collect):
            yield
        self.folded = {weight.folded for weights in self.weights.values() for weight in weights if weight.folded}

    @contextmanager
    def emitting(self) -> Iterator[None]:
        """Inside the block a traced forward contains the operators."""
        self.order.clear()
        with self._handling(self._emit):
            yield

    @contextmanager
    def _handling(self, handle: Callable[..., Any]) -> Iterator[None]:
        frames = self.quantized.runtime.frames

        def find(frame: Frame, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            kind = operation(name).kind
            index = frame.counts.get(kind, 0)
            frame.counts[kind] = index + 1
            site = self._sites.get((id(frame.node), kind, index))
            self.reached = site.layer if site is not None else self.reached
            return func(*args, **kwargs) if site is None else handle(site, func, args, kwargs)

        before, frames.handle = frames.handle, find
        modes = mode_stack()
        try:
            yield
        finally:
            frames.handle = before
            # A trace that fails skips the hooks of the modules it was in; torch.export then takes our mode off for its own and leaves that behind.
            frames.reset()
            restore_modes(modes)

    def _collect(self, site: Site, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if site.layer in self.quantized.weights:
            found = [at(args, kwargs, weight.slot) for weight in site.weights]
            if site.op.category in (Category.WEIGHTED, Category.MATMUL):
                bias = self._bias(site, args, kwargs)
                weights = [integer_weight(self.quantized, site.layer, tensor, bias, i) for i, tensor in enumerate(found)]
                self.weights[site.layer] = weights
                if site.op.kind in _BIASED and weights[0].bias is not None:
                    self.biases[site.layer] = self._integer_bias(site, weights[0].bias, weights[0].scale, args[0].dim())
                if site.op.kind == "conv" and self._reads_input(site):
                    self._block(site.layer, weights[0], args, kwargs)
            else:
                self.operands[site.layer] = [self._operand(site.layer, tensor, i) for i, tensor in enumerate(found)]
        return func(*args, **kwargs)

    def _operand(self, layer: str, tensor: Tensor, number: int) -> IntegerWeight | Tensor:
        """A parameter as integers; what is computed from one (a class token expanded to the batch) is rounded in the file, by this scale."""
        quantizer = self.quantized.weights[layer][number]
        if isinstance(tensor, nn.Parameter):
            integers, scale = quantizer.quantize(tensor)
            return IntegerWeight(integers, scale.reshape(()), None, None)
        return weight_scale(tensor, quantizer.num_bits, None)

    @staticmethod
    def _bias(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        if site.op.kind not in _BIASED:
            return None
        return args[2] if len(args) > 2 else kwargs.get("bias")

    def _emit(self, site: Site, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = site.layer
        if name in self.folded:
            result = args[0]
        elif name in self.blocked and all(isinstance(size, int) for size in args[0].shape[2:]):
            result = self._convolve_blocks(site, args[0])
        else:
            args, kwargs = self._with_inputs(site, args, kwargs)
            if site.op.kind == "embedding" and name in self.weights:
                result = self._embedding(self.weights[name][0], args, kwargs)
            else:
                args, kwargs = self._with_weights(site, args, kwargs)
                if site.op.kind == "linear" and name in self.quantized.activations and args and args[0].dim() > 2:
                    return self._linear(name, func, args, kwargs)
                if site.op.kind == "scaled_dot_product_attention":
                    func = attention
                result = func(*args, **kwargs)
                if averages_images(site.op.kind, args, kwargs):
                    return self._average(name, args[0], result)
        return self._with_outputs(site, args, result)

    def _linear(self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """A linear layer on rows: engines fuse weight, bias and rounding of a matrix product, not of a product of more dimensions."""
        x = args[0]
        rows = self._round(func(x.reshape(-1, x.shape[-1]), *args[1:], **kwargs), name)
        return rows.reshape(-1, *x.shape[1:-1], rows.shape[-1])

    def _average(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        """The average of each channel, rounded as engines do it: before the shape changes."""
        pooled: Tensor = self._symbolic("GlobalAveragePool", (x,), (*x.shape[:2], 1, 1), x.dtype)
        if name in self.quantized.activations:
            pooled = self._round(pooled, name)
        return pooled if result.dim() == 4 else pooled.flatten(1)

    def _reads_input(self, site: Site) -> bool:
        """Whether a layer reads, and so rounds by itself, what no function mode sees being made."""
        source = site.sources[0]
        return source.output == 0 and source.layer in self.quantized.activations and not self.quantized.capture.sites[source.layer].visible

    def _block(self, layer: str, weight: IntegerWeight, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("stride", "padding", "dilation", "groups")
        call = dict(zip(names, (1, 0, 1, 1), strict=True)) | dict(zip(names, args[3:], strict=False))
        call |= {name: value for name, value in kwargs.items() if name in names}
        form = blocked_convolution(weight.integers, tuple(args[0].shape[2:]), call, self.target.channel_multiple)
        if form is not None:
            self.blocked[layer] = replace(weight, integers=form.weight), form.pads

    def _convolve_blocks(self, site: Site, x: Tensor) -> Tensor:
        """A first convolution on blocks of pixels."""
        weight, pads = self.blocked[site.layer]
        n, channels, height, width = x.shape
        blocks = self._symbolic("SpaceToDepth", (x,), (n, 4 * channels, height // 2, width // 2), x.dtype, {"blocksize": 2})
        tensors = [self._round(blocks, site.sources[0].layer), self._dequantize_weight(weight)]
        if site.layer in self.biases:
            tensors.append(self._bias_value(site))
        kernel = list(weight.integers.shape[2:])
        sizes = (height // 2 + pads[0] + pads[2] - kernel[0] + 1, width // 2 + pads[1] + pads[3] - kernel[1] + 1)
        attributes = {"pads": list(pads), "kernel_shape": kernel}
        return self._symbolic("Conv", tuple(tensors), (n, weight.integers.shape[0], *sizes), x.dtype, attributes)

    def _with_inputs(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Quantize what comes from where no function mode can see: the model's inputs, custom functions."""
        for source in site.sources:
            key = f"{source.layer}:{source.output}" if source.output else source.layer
            if source.quantizable and key in self.quantized.activations and not self.quantized.capture.sites[source.layer].visible:
                args, kwargs = replaced(args, kwargs, source.slot, lambda x, key=key: self._round(x, key))  # type: ignore[misc]
        return args, kwargs

    def _with_weights(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for weight, integers in zip(site.weights, self.weights.get(site.layer, ()), strict=False):
            args, kwargs = replaced(args, kwargs, weight.slot, lambda _, w=integers: self._dequantize_weight(w))  # type: ignore[misc]
            if site.layer in self.biases:
                args, kwargs = self._with_bias(site, args, kwargs)
        for weight, operand in zip(site.weights, self.operands.get(site.layer, ()), strict=False):
            if isinstance(operand, IntegerWeight):
                args, kwargs = replaced(args, kwargs, weight.slot, lambda _, w=operand: self._dequantize_weight(w))  # type: ignore[misc]
            else:
                args, kwargs = replaced(args, kwargs, weight.slot, lambda x, s=operand: self._round_operand(x, s, site.layer))  # type: ignore[misc]
        return args, kwargs

    def _integer_bias(self, site: Site, bias: Tensor, weight_scale: Tensor, dimensions: int) -> tuple[Tensor, Tensor | None]:
        """The bias on the grid of the accumulator, whose step is that of the input times that of the weight.

        In float if the input is, if the engine wants it so, or if it is added to a product of more than two dimensions that is not rounded.
        """
        quantizer = self._input_quantizer(site)
        in_float = site.op.kind == "linear" and dimensions > 2 and site.layer not in self.quantized.activations
        if quantizer is None or in_float or not self.target.integer_bias:
            return bias, None
        scale = quantizer.scale.detach() * weight_scale
        return (bias / scale).round().clamp(-(2.0**31) + 128, 2.0**31 - 128).to(torch.int32), scale

    def _with_bias(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        value = self._bias_value(site)
        if len(args) > 2:
            return (*args[:2], value, *args[3:]), kwargs
        return args, {**kwargs, "bias": value}

    def _bias_value(self, site: Site) -> Tensor:
        value, scale = self.biases[site.layer]
        if scale is None:
            return value
        return self._symbolic("DequantizeLinear", (value, scale), value.shape, torch.float32, {"axis": 0} if scale.dim() else {})

    def _input_quantizer(self, site: Site) -> ActivationQuantizer | None:
        source = site.sources[0]
        layer, output = self.quantized.plan.origins.get((source.layer, source.output), (source.layer, source.output))
        return self.quantized.activations.get(f"{layer}:{output}" if output else layer)

    def _with_outputs(self, site: Site, args: tuple[Any, ...], result: Any) -> Any:
        if isinstance(result, Tensor):
            if site.layer not in self.quantized.activations:
                return result
            rounded = self._round(result, site.layer)
            return args[0].copy_(rounded) if site.in_place and site.layer not in self.folded else rounded
        if not isinstance(result, (tuple, list)):
            return result
        items = list(result)
        for output in range(len(items)):
            key = f"{site.layer}:{output}" if output else site.layer
            if key in self.quantized.activations:
                items[output] = self._round(items[output], key)
        return type(result)(*items) if hasattr(result, "_fields") else type(result)(items)

    def _round(self, x: Tensor, key: str) -> Tensor:
        """QuantizeLinear and DequantizeLinear; formats of fewer than 8 bits are stored in 8 with a narrower range."""
        scale, zero_point, limits = self._formats[key]
        if limits is not None:
            x = x.clamp(*limits)
        self.order.append(key)
        return self._pair(x, scale, zero_point)

    def _round_operand(self, x: Tensor, scale: Tensor, layer: str) -> Tensor:
        self.order.append(f"{layer}.operand")
        return self._pair(x, scale, torch.zeros((), dtype=torch.int8, device=scale.device))

    def _pair(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        levels = self._symbolic("QuantizeLinear", (x, scale, zero_point), x.shape, zero_point.dtype)
        return self._symbolic("DequantizeLinear", (levels, scale, zero_point), x.shape, torch.float32)

    def _dequantize_weight(self, weight: IntegerWeight) -> Tensor:
        attributes = {} if weight.axis is None else {"axis": weight.axis}
        zero_point = torch.zeros(weight.scale.shape, dtype=torch.int8, device=weight.scale.device)
        return self._symbolic(
            "DequantizeLinear", (weight.integers, weight.scale, zero_point), weight.integers.shape, torch.float32, attributes
        )

    def _embedding(self, weight: IntegerWeight, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Look integers up, then scale: dequantizing the whole table first would cost its float size again."""
        indices = args[0] if args else kwargs["input"]
        scale = weight.scale.reshape(-1, 1) if weight.scale.dim() else weight.scale.expand(weight.integers.shape[0], 1)
        return F.embedding(indices, weight.integers).to(torch.float32) * F.embedding(indices, scale)

    def _symbolic(
        self, operator: str, inputs: tuple[Tensor, ...], shape: Any, dtype: torch.dtype, attributes: dict[str, Any] | None = None
    ) -> Tensor:
        result: Tensor = torch.onnx.ops.symbolic(operator, inputs, dict(attributes or {}), dtype=dtype, shape=shape, version=self.opset)
        return result


def _format(quantizer: ActivationQuantizer) -> tuple[Tensor, Tensor, tuple[float, float] | None]:
    """Scale, zero point in its storage type, and the limits of a format of fewer than 8 bits."""
    scale, zero_point = quantizer.scale.detach().clone(), quantizer.zero_point.detach()
    limits = None
    if quantizer.num_bits < 8:
        low, high = quant_range(quantizer.num_bits, quantizer.symmetric)
        limits = (float((low - zero_point) * scale), float((high - zero_point) * scale))
    return scale, zero_point.to(torch.int8 if quantizer.symmetric else torch.uint8), limits
