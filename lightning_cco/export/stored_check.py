"""Compares what a file stores with the model, value by value, whatever batches come: formats of rounded tensors, integer weights, parameters left in float."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_cco.export.engine_patterns import shortened
from lightning_cco.export.fold_batch_norm import IntegerWeight, folded
from lightning_cco.export.ort_session import QuantizeNode, constants
from lightning_cco.export.qdq_emitter import Emitter
from lightning_cco.export.stored_blocks import ALMOST, StoredBlocks, attribute, stored_blocks
from lightning_cco.graph.einsum_equations import MatrixProduct, matrix_product
from lightning_cco.graph.layer import Layer
from lightning_cco.graph.ops import operation_of_kind
from lightning_cco.quantization.model import HookedModel
from lightning_cco.quantization.tensor_key import TensorKey

Array = np.ndarray[Any, Any]
_TOLERANCE = 1e-5
"""Of a scale: what is left of computing one in float32 in another order."""
_FLOAT32 = 1e-6
"""Of a bias: what float32 leaves of it in 32 bits."""


def stored_faults(
    quantized: HookedModel,
    model: Any,
    emitter: Emitter,
    rounded: Mapping[str, list[QuantizeNode]],
    weights: Mapping[tuple[str, int], tuple[Tensor, Tensor]],
) -> dict[str, str]:
    """What a file stores otherwise than the model has it.

    Args:
        quantized: The model.
        model: The loaded file.
        emitter: What wrote it.
        rounded: Its quantize nodes by quantizer name.
        weights: What each weight quantizer was given and gave, by layer and number.

    Returns:
        By layer, in words; a layer whose stored form this does not know is left to the comparison of what it computes.
    """
    values = constants(model)
    faults: dict[str, str] = {}
    for key, what in _formats(quantized, model, rounded):
        faults.setdefault(key.layer, what)
    expected = _Expected(quantized, emitter, weights)
    for node in model.graph.node:
        layer = emitter.layers.get(node.name, "")
        what = _weight_fault(model, values, node, layer, expected)
        if what:
            faults.setdefault(layer, what)
    for layer, what in _parameter_faults(quantized, values):
        faults.setdefault(layer, what)
    return faults


def _weight_fault(model: Any, values: Mapping[str, Any], node: Any, layer: str, expected: _Expected) -> str:
    """What is wrong with the weights that a node holds, in words; nothing if it holds none, or they are right."""
    blocks = stored_blocks(model, values, node)
    if blocks is not None:
        return blocks if isinstance(blocks, str) else expected.in_blocks(layer, blocks)
    if node.op_type == "DequantizeLinear" and node.input[0] in values:
        return expected.dequantized(layer, [values.get(name) for name in node.input], attribute(node, "axis", 1))
    if node.op_type == "Gather" and node.input[0] in values:
        return expected.table(layer, values[node.input[0]])
    return ""


def _parameter_faults(quantized: HookedModel, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Parameters that a file holds in float with other values."""
    graph = quantized.graph
    for name, parameter in quantized.model.named_parameters():
        if name not in values or values[name].dtype.kind != "f" or values[name].shape != tuple(parameter.shape):
            continue
        wanted = parameter.detach().float().cpu().numpy()
        if np.array_equal(values[name], wanted, equal_nan=True):
            continue
        layer = next((entry.name for entry in graph if name in entry.parameters), name)
        if layer in graph and any(graph[reader].kind == "batch_norm" for reader in graph.successors(layer)):
            continue  # a layer in float, into whose weights the exporter may have folded the norm after it
        yield layer, f"the parameter '{name}' is off by up to {_most(values[name], wanted):.3g}"


def _formats(quantized: HookedModel, model: Any, rounded: Mapping[str, list[QuantizeNode]]) -> Iterator[tuple[TensorKey, str]]:
    """Scales and zero points of the activations, of both nodes of each pair."""
    values = constants(model)
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            readers.setdefault(node.input[0], []).append(node)
    for key, quantizer in quantized.activations.items():
        scale, zero_point = float(quantizer.scale), int(quantizer.zero_point)
        for entry in rounded.get(key, []):
            found = [(entry.scale, entry.zero_point)]
            for node in readers.get(entry.tensor, []):
                format_ = [values[name].reshape(-1) for name in node.input[1:3] if name in values]
                found += [(float(format_[0][0]), int(format_[1][0]))] if len(format_) == 2 else []
            for one, point in found:
                if abs(one - scale) > _TOLERANCE * scale:
                    yield key, f"its scale is {one:.6g} instead of {scale:.6g}"
                if point != zero_point:
                    yield key, f"its zero point is {point} instead of {zero_point}"


class _Expected:
    """What layers may store: their fake-quantized weights, with batch norms and constants folded in, and their biases."""

    def __init__(self, quantized: HookedModel, emitter: Emitter, weights: Mapping[tuple[str, int], tuple[Tensor, Tensor]]) -> None:
        self.quantized, self.stored = quantized, emitter.stored
        self.weights: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
        for (layer, number), (given, got) in weights.items():
            if layer in self.stored.bounds:
                given = shortened(given, *self.stored.bounds[layer])
                got = quantized.weights[layer][number](given)
            elif given.dtype in (
                torch.bfloat16,
                torch.float16,
            ):  # the file has the same integers and scales, whose products the model rounds once more
                got = quantized.weights[layer][number](given.float())
            self.weights.setdefault(layer, []).append((number, given, got))

    def in_blocks(self, layer: str, blocks: StoredBlocks) -> str:
        """What is wrong with a layer's matrix in blocks; empty: nothing."""
        return blocks.off(got.float().cpu().numpy() for _, _, got in self.weights.get(layer, []))

    def dequantized(self, layer: str, arrays: list[Array | None], axis: int) -> str:
        """What is wrong with constants that are dequantized; empty: nothing, or they are in a form that is not known here.

        Args:
            layer: Whose they are.
            arrays: Integers, scales, and zero points if there are any.
            axis: The axis of the channels.
        """
        integers, scale, *rest = arrays
        if integers is None or scale is None:
            return ""
        shape = [1] * integers.ndim
        if scale.size > 1:
            shape[axis] = -1
        step = np.broadcast_to(scale.astype(np.float64).reshape(shape), integers.shape)
        zero_point = (
            rest[0].astype(np.float64).reshape(shape if rest[0].size > 1 else [1] * integers.ndim) if rest and rest[0] is not None else 0.0
        )
        value = (integers.astype(np.float64) - zero_point) * step
        forms = [(value, step)] if value.ndim != 2 else [(value, step), (value.T, step.T)]  # a product's may be stored transposed
        worst: float | None = None
        for form, form_step in forms:
            for wanted, allowed in self._candidates(layer):
                steps = _steps_off(form, form_step, wanted, allowed, operation_of_kind(self.quantized.graph[layer].kind).recurrent)
                if steps is not None and steps <= ALMOST:
                    return ""
                worst = min((entry for entry in (worst, steps) if entry is not None), default=None)
        return "" if worst is None else f"its stored weights differ by up to {worst:.3g} steps of scale"

    def table(self, layer: str, array: Array) -> str:
        """What is wrong with a table of integers, or of their scales, that is looked up."""
        for number, given, _ in self.weights.get(layer, []):
            quantizer = self.quantized.weights[layer][number]
            (integers, scale), points = quantizer.quantize(given), quantizer.zero_points(given)
            rows = scale if scale.dim() == 2 and scale.shape[1] > 1 else scale.reshape(-1, 1).expand(integers.shape[0], 1)
            zeros = [] if points is None else [points]
            for wanted in (integers, rows, *zeros):
                if tuple(wanted.shape) == array.shape and (array.dtype.kind == "i") == (wanted is not rows):
                    off = _most(array, wanted.cpu().numpy())
                    if off > (_TOLERANCE * float(scale.max()) if wanted is rows else 0):
                        rows_off = int((np.abs(array.astype(np.float64) - wanted.cpu().numpy()).max(-1) > 0).sum())
                        return f"{rows_off} rows of its table are not those of the model"
        return ""

    def _candidates(self, layer: str) -> Iterator[tuple[Array, Array | float]]:
        """Values that the layer may store, and by how much they may be off."""
        if layer in self.stored.blocked:
            weight = self.stored.blocked[layer][0]
            yield _values(weight), 0.0
        for number, _, got in self.weights.get(layer, []):
            stored = next(iter(self.stored.weights.get(layer, [])[number : number + 1]), None)
            wanted = got.double()
            slack: Array | float = 0.0
            if stored is not None:
                shape = [1] * wanted.dim()
                if stored.axis is not None:
                    shape[stored.axis] = -1
                factor = self._factor(stored)
                if factor is not None:
                    wanted = wanted * factor.reshape(shape)
                slack = self._slack(layer, stored, shape)
            yield wanted.cpu().numpy(), slack
            product = _einsum_product(self.quantized.graph[layer], wanted.dim())
            if product is not None:
                yield product.matrix(wanted).cpu().numpy(), slack
        if layer in self.stored.biases and self.stored.weights.get(layer):
            bias, scale = self.stored.weights[layer][0].bias, self.stored.biases[layer][1]
            if bias is not None and scale is not None:
                value: Array = bias.double().cpu().numpy()
                yield value, 0.5001 * scale.double().cpu().numpy() + _FLOAT32 * np.abs(value)

    def _factor(self, stored: IntegerWeight) -> Tensor | None:
        """What the layers folded in multiply each channel by."""
        if not stored.folded:
            return None
        return folded((self.stored.folded[name] for name in stored.folded), torch.float64)[0]

    def _slack(self, layer: str, stored: IntegerWeight, shape: list[int]) -> Array | float:
        """Half a step where a channel's grid is coarser to make room for its bias in 32 bits."""
        site = self.quantized.capture.sites[layer]
        key = self.stored.quantizer_of(site) if site.sources else None
        if key is None or stored.bias is None or stored.scale.shape not in (stored.bias.shape, ()):
            return 0.0
        needed = stored.bias.detach().double().abs() / (float(self.quantized.activations[key].scale) * 2.0**30)
        needed = needed if stored.scale.dim() else needed.amax()
        coarse = torch.where(stored.scale.double() <= needed * (1 + _TOLERANCE), 0.5001 * needed, torch.zeros_like(needed))
        return coarse.reshape(shape if coarse.dim() else [1] * len(shape)).cpu().numpy()


def _einsum_product(layer: Layer, dimensions: int) -> MatrixProduct | None:
    """What a file holds the weight of an einsum as, if it is a product with a matrix."""
    if layer.kind != "einsum" or not layer.input_shapes:
        return None
    return matrix_product(layer.attributes.get("equation"), len(layer.input_shapes[0]), dimensions)


def _steps_off(value: Array, step: Array, wanted: Array, allowed: Array | float, recurrent: bool) -> float | None:
    """How far values are at most from those expected, in steps of their scale; `None` where the two have no form in common."""
    found: list[float] = []
    for part, slack in _parts(wanted, allowed, value.shape, recurrent):
        if part is None:
            found.append(float((np.abs(_sorted_rows(value) - _sorted_rows(wanted)) - slack).max(initial=0.0) / step.max()))
        else:
            found.append(float(((np.abs(value - part) - slack) / np.maximum(step, 1e-30)).max(initial=0.0)))
    return min(found, default=None)


def _parts(wanted: Array, allowed: Array | float, shape: tuple[int, ...], recurrent: bool) -> Iterator[tuple[Array | None, Any]]:
    """The expected values where they have a shape: as a whole, rows of it (a product that was split), and for recurrent layers its rows in another order."""
    if wanted.shape == shape:
        yield wanted, allowed
    elif wanted.ndim == len(shape) and wanted.shape[1:] == shape[1:] and wanted.shape[0] % shape[0] == 0:
        for start in range(0, wanted.shape[0], shape[0]):
            rows = slice(start, start + shape[0])
            yield wanted[rows], allowed[rows] if isinstance(allowed, np.ndarray) and allowed.size > 1 else allowed
    if recurrent and wanted.size == int(np.prod(shape)) and wanted.shape[-1] == shape[-1]:
        yield None, 0.0


def _sorted_rows(values: Array) -> Array:
    rows = values.reshape(-1, values.shape[-1])
    return rows[np.lexsort(rows.T[::-1])]


def _values(weight: IntegerWeight) -> Array:
    shape = [1] * weight.integers.dim()
    if weight.axis is not None and weight.scale.dim():
        shape[weight.axis] = -1
    return ((weight.integers.double() - weight.zero_point) * weight.scale.double().reshape(shape)).cpu().numpy()


def _most(one: Array, other: Array) -> float:
    return float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max(initial=0.0))
