"""The layer graph as a GraphDef, for TensorBoard's interactive Graphs page: nodes collapse by module.

The page opens with all boxes closed, and a slash in a name is a box. So the modules that are to be seen at once have names without slashes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lightning_cco.drawing.modules_view import module_of_each_layer
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.names import printable
from lightning_cco.quantization.plan import QuantizationPlan

_MOST = 20  # boxes that are seen at once


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

    full = _node_names(plan.graph)
    nodes = []
    for layer in plan.graph:
        decision = plan.decisions[layer.name]
        said = decision.bits(" ") or "INT8" if decision.quantized else plan.skipped.get(layer.name, "")
        shapes = AttrValue.ListValue(
            shape=[TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in shape]) for shape in layer.output_shapes]
        )
        attributes = {
            "module": AttrValue(s=printable(layer.path).encode()),
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


def _node_names(graph: LayerGraph) -> dict[str, str]:
    """The name of each layer's node: the module that is seen at once, and its path in that."""
    outermost = module_of_each_layer(graph, _MOST)
    short = _short_names(sorted({path for path in outermost.values() if path}))
    found = {}
    for layer in graph:
        module = outermost[layer.name]
        inside = layer.path[len(module) + 1 :].split(".") if module else []
        parts = [short.get(module, ""), *inside, layer.name]
        found[layer.name] = "/".join(re.sub(r"[^A-Za-z0-9_.\\-]", "_", part) for part in parts if part)
    return found


def _short_names(paths: Sequence[str]) -> dict[str, str]:
    """The last parts of paths, as many as tell apart those of one depth, from a name on that is no number: TensorBoard cuts long names at their end."""
    found: dict[str, str] = {}
    for depth in sorted({path.count(".") for path in paths}):
        group = [path for path in paths if path.count(".") == depth]
        for kept in range(1, depth + 2):
            tails = [".".join(path.split(".")[-kept:]) for path in group]
            fresh = len(set(tails)) == len(tails) and not set(tails).intersection(found.values())
            if kept > depth or (fresh and not any(tail[0].isdigit() for tail in tails)):
                found.update(zip(group, tails, strict=True))
                break
    return found
