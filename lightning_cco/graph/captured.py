"""What a capture gives: the layer graph, and where each of its layers happens in a running model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lightning_cco.graph.call import ArgPath, Call, Weight
from lightning_cco.graph.call_node import CallNode
from lightning_cco.graph.layer import Edge, Layer
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.graph.matching import match_training, merge_repeats, overwritten_calls
from lightning_cco.graph.ops import Op
from lightning_cco.graph.trace import Tracer
from lightning_cco.names import is_within


@dataclass(frozen=True)
class Source:
    """A tensor that a layer reads: its place among the arguments, the layer that produced it, and whether it can be quantized at all."""

    slot: ArgPath
    layer: str
    output: int
    quantizable: bool


@dataclass(frozen=True)
class CallSite:
    """Where a layer happens at run time.

    Attributes:
        layer: Its name.
        node: The module call it happens in.
        op: Its row in the table of operations.
        function: Name of the torch function, as called.
        positions: Index of the call among those of its operation within the frame, for evaluation (`False`) and training (`True`).
        sources: What it reads from other layers.
        weights: What it multiplies by.
        in_place: Whether it overwrites its first argument, which the caller may go on using.
        overwritten: Whether a later call writes over its output or over a view of it.
        visible: Whether the function mode sees it.
        code_position: Place of the call in the user's code; -1 if it distinguishes nothing.
    """

    layer: str
    node: CallNode
    op: Op
    function: str
    positions: Mapping[bool, int]
    sources: tuple[Source, ...] = ()
    weights: tuple[Weight, ...] = ()
    in_place: bool = False
    overwritten: bool = False
    visible: bool = True
    code_position: int = -1


@dataclass
class Capture:
    """A layer graph together with what it takes to find its layers again in a running model.

    Attributes:
        graph: The layers and edges.
        root: The tree of module calls.
        sites: Where each layer happens.
        training_only: Calls that only training makes; they are never quantized.
        evaluation_only: Calls that only evaluation makes, if a forward in training mode was seen.
        needs_gradients: Whether the forward computes gradients itself, so that it fails under `torch.no_grad`.
        left_out: Paths of modules with parameters that serve losses alone, so that they are no layers.
        called: Paths of the modules that were called from outside of any other, teachers not among them.
        apart: Paths of the modules that the forward calls in other threads alone, so that they are no layers.
        partly_apart: Paths of those that it calls there and in its own thread: the calls there are no layers, and in float.
        hooked: Paths of the modules that had hooks of the user's own, which read the values of the float run.
    """

    graph: LayerGraph
    root: CallNode
    sites: dict[str, CallSite]
    training_only: list[Call] = field(default_factory=list)
    evaluation_only: list[Call] = field(default_factory=list)
    needs_gradients: bool = False
    left_out: list[str] = field(default_factory=list)
    called: tuple[str, ...] = ()
    hooked: frozenset[str] = frozenset()
    apart: tuple[str, ...] = ()
    partly_apart: tuple[str, ...] = ()


def assemble(root: CallNode, evaluation: Tracer, training: Tracer | None, frozen: list[str]) -> Capture:
    """Make layers, edges and call sites of what was seen.

    Args:
        root: The tree of module calls.
        evaluation: The forward in evaluation mode.
        training: That in training mode; `None` if it failed.
        frozen: Paths of modules that training only asks.
    """
    calls, merged = merge_repeats(evaluation.calls)
    order = sorted(range(len(calls)), key=lambda i: {"input": 0, "output": 2}.get(calls[i].layer.kind, 1))
    names: dict[int, str] = {}
    counters: dict[str, int] = {}
    for i in order:
        kind = calls[i].layer.kind
        count = counters.get(kind, 0)
        counters[kind] = count + 1
        names[i] = f"{kind}_{count}" if count or kind in ("input", "output") else kind
    rank = {i: position for position, i in enumerate(order)}

    matched = match_training(calls, None if training is None else training.calls)
    evaluated_alone = {id(call) for call in matched.evaluation_only}
    overwritten = {merged[number] for number in overwritten_calls(evaluation.calls) if number in merged}
    layers: list[Layer] = []
    edges: dict[Edge, None] = {}
    sites: dict[str, CallSite] = {}
    for i in order:
        call = calls[i]
        # An encoder run again on a decoder's output would close a cycle; the first reading is the one shown.
        reads = [(r, merged[r.source]) for r in call.reads if rank[merged[r.source]] < rank[i]]
        around = next((path for path in frozen if is_within(call.layer.path, [path])), "")
        # What evaluation alone multiplies by is no part of what is trained; where training has left out both, it may be.
        alone = id(call) in evaluated_alone and any(id(calls[source]) not in evaluated_alone for _, source in reads)
        layers.append(replace(call.layer, name=names[i], frozen=around, constant=None if alone else call.layer.constant))
        for k, (read, source) in enumerate(reads):
            edges[Edge(names[source], names[i], read.output, k)] = None
        sites[names[i]] = CallSite(
            names[i],
            call.node,
            call.op,
            call.function,
            matched.positions[i],
            tuple(Source(read.slot, names[source], read.output, read.quantizable) for read, source in reads),
            tuple(call.weights),
            call.in_place,
            i in overwritten,
            call.visible,
            call.position,
        )
    return Capture(LayerGraph(layers, list(edges)), root, sites, matched.training_only, matched.evaluation_only)
