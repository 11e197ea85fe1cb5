"""What an engine's optimized graph computes in INT8, what in float, and which layers are behind that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lightning_cco.export.island_kinds import FloatIsland, IslandKind
from lightning_cco.export.planned_floats import planned_to_compute, without_range
from lightning_cco.export.provenance import NodeLayers
from lightning_cco.export.qdq_emitter import Emitter
from lightning_cco.export.report import ExportReport
from lightning_cco.export.value_types import float_nodes
from lightning_cco.export.weight_blocks import LOOKUP, PRODUCT, rounds_as_it_runs
from lightning_cco.graph.ops import operation_of_kind
from lightning_cco.names import list_names
from lightning_cco.quantization.model import HookedModel

_INT4 = 22
"""`onnx.TensorProto.INT4`."""
_CONVERSIONS = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
_INTEGER = ("QLinear", "QGemm", "QAttention", "ConvInteger", "MatMulInteger", PRODUCT, LOOKUP, "QEmbed", "QOrdered")
_HEAVY = frozenset({
    "Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Einsum", "GlobalAveragePool", "AveragePool",
    "ReduceMean", "Add", "Sub", "Mul", "Div", "Concat", "Resize", "Sigmoid", "LeakyRelu", "LSTM", "GRU", "RNN",
})  # fmt: skip
"""Operators that an engine has an INT8 kernel of, or that most of the time goes to: layers in float are named that have one. Of a layer that is planned in INT8
every operator counts."""
_FLOAT_PRODUCTS = frozenset({"Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"})
_IN_FOUR_BITS = IslandKind.FOUR_BITS, "its weights are stored in 4 bits, for which the engine has no INT8 product"


def read_optimized(quantized: HookedModel, model: Any, written: Any, emitter: Emitter, report: ExportReport) -> None:
    """Count what an engine's optimized graph computes how, and name the layers that it computes in float.

    Args:
        quantized: The model.
        model: The optimized graph.
        written: The file that it was made of.
        emitter: What wrote that.
        report: Filled in place.
    """
    layers = NodeLayers(written, emitter.layers, model.graph)
    planned = planned_to_compute(quantized)
    kinds: Counter[str] = Counter()
    known = {entry.name for entry in model.graph.initializer}
    sizes: set[str] = set()
    heavy, in_integers = [], set()
    on_floats = {id(node): node for node in float_nodes(model)}
    in_float: Counter[str] = Counter()
    for node in model.graph.node:
        varying = {name for name in node.input if name and name not in known}
        if node.op_type in ("Shape", "Size") or (varying and varying <= sizes):
            sizes.update(node.output)  # what is computed from sizes alone is no layer's
            continue
        kinds[node.op_type] += 1
        layer = layers.of(node)
        if node.op_type.startswith(_INTEGER):
            in_integers.add(layer)
        elif id(node) in on_floats:
            in_float[node.op_type] += 1
            if node.op_type in _HEAVY or layer in planned:
                heavy.append((node.op_type, layer))
            if node.op_type in _FLOAT_PRODUCTS and (product := layers.product_of(node)) in planned - {layer}:
                heavy.append((node.op_type, product))
    engine = emitter.stored.engine
    unexpected = IslandKind.UNPLANNED, "planned in INT8, but the engine computes it in float"
    if engine.load is not None or engine.not_run:
        reason = f"planned in INT8 for {engine.name}; ONNX Runtime, in which the file is checked, computes it in float"
        unexpected = IslandKind.IN_ORT_ALONE, reason
    blocks = emitter.stored.blocks
    packed = _packed(written, emitter) - set(blocks)
    as_they_are = [(layers.of(node), node) for node in model.graph.node if node.op_type in (PRODUCT, LOOKUP)]
    fused = {layer for layer, _ in as_they_are}
    report.zero_points = len({layer for layer, node in as_they_are if len(node.input) > 3 and node.input[3] and layer in blocks})
    report.dynamic = sorted({layer for layer, node in as_they_are if layer in quantized.plan.dynamic and rounds_as_it_runs(node)})
    wanted = [name for name, block in blocks.items() if block.as_it_is]
    report.in_groups, report.as_floats = len(wanted), [name for name in wanted if name not in fused]
    for operator, layer in heavy:
        island = _island(quantized, operator, layer, layer in in_integers, _IN_FOUR_BITS if layer in packed else unexpected)
        if island is not None and island not in report.float_islands:
            report.float_islands.append(island)
    unasked = sorted(name for name in in_integers if name in quantized.graph and _left_in_float(quantized, emitter, name))
    if unasked and engine.load is None and not engine.not_run:
        report.unasked = unasked
        report.notes.append(unasked_note(unasked))
    report.integer_nodes = {kind: count for kind, count in kinds.items() if kind.startswith(_INTEGER)}
    rounding = list(dict.fromkeys(layer for layer, node in as_they_are if node.op_type == PRODUCT and layer not in report.dynamic))
    if rounding and not packed and engine.load is None and not engine.not_run:
        own = any(node.op_type == PRODUCT and emitter.layers.get(node.name) in rounding for node in written.graph.node)
        report.notes.append(
            f"ONNX Runtime rounds to 8 bits what {list_names(rounding)} read{'s' if len(rounding) == 1 else ''}, although the weights alone are integers "
            '(MatMulNBits, seen in 1.32). To compute it in float, which takes many times longer: options.add_session_config_entry("session.'
            f'qdq_matmulnbits_accuracy_level", "1"){", and accuracy_level of the MatMulNBits in the file" if own else ""}'
        )
    report.float_nodes = dict(in_float)
    report.conversions = sum(count for kind, count in kinds.items() if kind in _CONVERSIONS)


def unasked_note(layers: Sequence[str]) -> str:
    """What the report and a warning say of layers that are computed in INT8 though the plan leaves them in float."""
    return f"the engine computes {list_names(layers)} in INT8, which {'is' if len(layers) == 1 else 'are'} to stay in float"


def _left_in_float(quantized: HookedModel, emitter: Emitter, name: str) -> bool:
    """Whether a layer with weights has float ones in the file."""
    return name in quantized.plan.skipped and quantized.graph[name].weighted and name not in emitter.stored.weights


def _packed(written: Any, emitter: Emitter) -> set[str]:
    """Layers whose weights the file holds in 4 bits."""
    packed = {entry.name for entry in written.graph.initializer if entry.data_type == _INT4}
    layers = set()
    for node in written.graph.node:  # in order: what moves a weight comes before its product
        if packed.intersection(node.input):
            layers.add(emitter.layers.get(node.name, ""))
            if node.op_type in ("DequantizeLinear", "Transpose", "Reshape"):
                packed.update(node.output)
    return layers


def _island(
    quantized: HookedModel, operator: str, layer: str, partly_integer: bool, unexpected: tuple[IslandKind, str]
) -> FloatIsland | None:
    """The layer behind a node that computes in float, and why; `None` for a part of a layer that runs in INT8, such as the bias of a product."""
    plan = quantized.plan
    if layer not in quantized.graph:
        return FloatIsland(operator, (layer or "what is computed before any layer",), "no layer of the model", IslandKind.NO_LAYER)
    if layer in plan.skipped:
        return FloatIsland(operator, (layer,), plan.skipped[layer], IslandKind.PLANNED)
    if partly_integer:
        return None
    if operation_of_kind(quantized.graph[layer].kind).looks_up:
        return FloatIsland(operator, (layer,), "dequantizes the rows that were looked up as integers", IslandKind.LOOKUP)
    without = without_range(quantized, layer)
    kind, reason = (IslandKind.NO_RANGE, without) if without else unexpected
    return FloatIsland(operator, (layer,), reason, kind)
