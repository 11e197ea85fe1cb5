"""Quantize and dequantize operators around the calls of a file, and the stored tensors in the places of their operands."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from lightning_cco.export.dialects import Dialect, Format
from lightning_cco.export.engine_patterns import without_bound
from lightning_cco.export.engines import FileFeature
from lightning_cco.export.errors import ExportError
from lightning_cco.export.fold_batch_norm import IntegerWeight
from lightning_cco.export.ort_session import operand_name
from lightning_cco.export.stored_tensors import StoredWeights
from lightning_cco.graph.captured import CallSite
from lightning_cco.graph.ops import Category
from lightning_cco.names import list_names
from lightning_cco.quantization.call_arguments import replaced
from lightning_cco.quantization.clamp_limits import LIMITS
from lightning_cco.quantization.model import HookedModel
from lightning_cco.quantization.qparams import level_bounds, quant_range
from lightning_cco.quantization.tensor_key import TensorKey


class QdqPairs:
    """Writes the pairs of a quantized model.

    Args:
        quantized: The calibrated model.
        stored: Its weights.
        dialect: The operators of the file.

    Attributes:
        order: Quantizer name of each quantize operator, in the order written.
    """

    def __init__(self, quantized: HookedModel, stored: StoredWeights, dialect: Dialect) -> None:
        self.quantized, self.stored, self.dialect = quantized, stored, dialect
        self.order: list[str] = []
        self._formats = {key: Format.of(quantizer) for key, quantizer in quantized.activations.items()}
        self._operands: dict[str, list[Format]] = {}

    def prepare(self) -> None:
        """Make what is constant: while somebody traces, it would become a part of the file's computation."""
        self.order.clear()
        zero_point, dtype = self.stored.operand_format
        self._operands = {
            layer: [Format.made(scale, zero_point, dtype) for scale in operands if isinstance(scale, Tensor)]
            for layer, operands in self.stored.operands.items()
        }

    def with_inputs(self, site: CallSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Quantize what is rounded at its readers: the model's inputs, tensors that an index is made of."""
        for number, key in self.quantized.plan.reads.get(site.layer, {}).items():
            source = site.sources[number]
            if site.in_place and source.slot == (0,):
                continue  # the caller's own tensor, which is written to
            if source.quantizable:
                args, kwargs = replaced(args, kwargs, source.slot, lambda x, key=key: self.round(x, key))  # type: ignore[misc]
        return args, kwargs

    def with_weights(self, site: CallSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put what the file stores in the places of weights, biases and constant operands."""
        for weight, integers in zip(site.weights, self.stored.weights.get(site.layer, ()), strict=False):
            block = self.stored.blocks.get(site.layer)
            args, kwargs = replaced(args, kwargs, weight.slot, lambda _, w=integers, b=block: self.dialect.weight(w, b))  # type: ignore[misc]
            if site.layer in self.stored.biases:
                args, kwargs = self._with_bias(site, args, kwargs)
        formats = iter(self._operands.get(site.layer, ()))
        for number, (weight, operand) in enumerate(zip(site.weights, self.stored.operands.get(site.layer, ()), strict=False)):
            if isinstance(operand, IntegerWeight):
                args, kwargs = replaced(args, kwargs, weight.slot, lambda _, w=operand: self.dialect.weight(w, None))  # type: ignore[misc]
            else:
                format, name = next(formats), operand_name(site.layer, number)
                args, kwargs = replaced(args, kwargs, weight.slot, lambda x, f=format, name=name: self._pair(x, f, name))  # type: ignore[misc]
        return args, kwargs

    def with_table(self, site: CallSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The rows of a table are within ``max_norm`` already."""
        args, kwargs = without_bound(args, kwargs)
        table = self.stored.tables.get(site.layer)
        return (args, kwargs) if table is None else replaced(args, kwargs, site.weights[0].slot, lambda _: table)

    def _with_bias(self, site: CallSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        value = self.bias_value(site)
        if site.op.adds_first:
            return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, "input": value})
        if len(args) > 2:
            return (*args[:2], value, *args[3:]), kwargs
        return args, {**kwargs, "bias": value}

    def bias_value(self, site: CallSite) -> Tensor:
        """The stored bias of a layer."""
        return self.dialect.bias(*self.stored.biases[site.layer])

    def folded_clamp(self, site: CallSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
        """First and last level of a rounded tensor after a clamp that rounding does; `None`: the clamp is written as it is."""
        known = LIMITS.get(site.function) if site.op.category is Category.CLAMP else None
        key = TensorKey(site.layer)
        if known is None or not self.stored.engine.requires(FileFeature.INTEGER_CLIPS) or not self.quantized.plan.rounds(key):
            return None
        quantizer, interval = self.quantized.activations[key], known(args, kwargs)
        if interval is None or quantizer.empty:
            return None
        zero_point = int(quantizer.zero_point)
        low, high = (level - zero_point for level in quant_range(quantizer.num_bits, quantizer.symmetric))
        first, last = level_bounds(float(quantizer.scale), low, high, interval)
        return int(first) + zero_point, int(last) + zero_point

    def with_outputs(self, site: CallSite, args: tuple[Any, ...], result: Any, limits: tuple[int, int] | None = None) -> Any:
        """Round what a layer gives, where the plan says so; an assignment (``y[:, 0] = x``) gives nothing, and what it has written to is rounded."""
        if result is None and self.quantized.plan.rounds(TensorKey(site.layer)):
            args[0].copy_(self.round(args[0], TensorKey(site.layer)))
            return None
        if isinstance(result, Tensor):
            if not self.quantized.plan.rounds(TensorKey(site.layer)):
                return result
            rounded = self.round(result, TensorKey(site.layer), limits)
            return args[0].copy_(rounded) if site.in_place else rounded
        if not isinstance(result, (tuple, list)):
            return result
        items = list(result)
        for output in range(len(items)):
            key = TensorKey(site.layer, output)
            if self.quantized.plan.rounds(key):
                items[output] = self.round(items[output], key)
        return type(result)(*items) if hasattr(result, "_fields") else type(result)(items)

    def refuse_unrounded(self, site: CallSite, written: Collection[str]) -> None:
        """Refuse a call whose results are written without the rounding that the plan has for them.

        Args:
            site: The call.
            written: Quantizer name of each quantize operator that was written for it.

        Raises:
            ExportError: The layers after it would compute in float, which no comparison of rounded tensors sees.
        """
        results = (TensorKey(site.layer, output) for output in range(len(self.quantized.graph[site.layer].output_dtypes)))
        planned = [key for key in results if self.quantized.plan.rounds(key) and not self.quantized.activations[key].empty]
        if missing := [key for key in planned if key not in written]:
            raise ExportError(
                f"layer '{site.layer}': expected {list_names(missing)} to be rounded as planned, but {site.function} was written without it, so the layers "
                f"after it would compute in float. Skip the layer (skip_quantization: true), and please open an issue with its code."
            )

    def round(self, x: Tensor, key: TensorKey, limits: tuple[int, int] | None = None) -> Tensor:
        """Quantize and dequantize; formats of fewer than 8 bits are stored in 8 with a narrower range.

        Args:
            x: What is rounded.
            key: Name of its quantizer.
            limits: First and last level, if a clamp narrows the format.
        """
        if self.quantized.activations[key].empty:
            return x
        format = self._formats[key]
        levels = limits or format.levels
        if levels is None or self.stored.engine.requires(FileFeature.INTEGER_CLIPS):
            return self._pair(x, format, key, levels)
        return self._pair(x.clamp(*map(format.value, levels)), format, key)

    def _pair(self, x: Tensor, format: Format, name: str, limits: tuple[int, int] | None = None) -> Tensor:
        self.order.append(name)
        return self.dialect.pair(x, format, name, limits)
