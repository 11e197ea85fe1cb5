"""The layer graph as a GraphDef, for TensorBoard's interactive Graphs page: nodes collapse by module."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lightning_cco.names import printable
from lightning_cco.quantization.plan import QuantizationPlan


def graph_def(plan: QuantizationPlan, qs: Mapping[str, float]) -> bytes:
    """Serialize a plan's graph.

    Args:
        plan: The plan; each node carries whether it is quantized, its bits or the reason, and its shapes.
        qs: Quantization Sensitivity by layer, shown where known.
    """
    # Imported on first use: a run without TensorBoard needs none of it, and it takes half a second.
    from tensorboard.compat.proto.attr_value_pb2 import AttrValue
    from tensorboard.compat.proto.graph_pb2 import GraphDef
    from tensorboard.compat.proto.node_def_pb2 import NodeDef
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.versions_pb2 import VersionDef

    full = {layer.name: _node_name(layer.path, layer.name) for layer in plan.graph}
    nodes = []
    for layer in plan.graph:
        decision = plan.decisions[layer.name]
        said = decision.bits(" ") or "INT8" if decision.quantized else plan.skipped.get(layer.name, "")
        shapes = AttrValue.ListValue(
            shape=[TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in shape]) for shape in layer.output_shapes]
        )
        attributes = {
            "_output_shapes": AttrValue(list=shapes),
            "quantized": AttrValue(b=decision.quantized),
            "decision": AttrValue(s=printable(said).encode()),
            **{printable(name): AttrValue(s=printable(value).encode()) for name, value in layer.attributes.items()},
        }
        if layer.name in qs:
            attributes["quantization_sensitivity"] = AttrValue(f=qs[layer.name])
        nodes.append(
            NodeDef(
                name=full[layer.name],
                op=printable(layer.kind),
                input=[full[name] for name in plan.graph.predecessors(layer.name)],
                device="INT8" if decision.quantized else "float",  # the page can colour by device
                attr=attributes,
            )
        )
    return bytes(GraphDef(node=nodes, versions=VersionDef(producer=22)).SerializeToString())


def _node_name(path: str, name: str) -> str:
    return "/".join(re.sub(r"[^A-Za-z0-9_.\\-]", "_", part) for part in [*path.split("."), name] if part)
