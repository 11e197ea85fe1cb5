"""What folds: repeated blocks, whole modules, and that nothing is lost by it."""

from __future__ import annotations

from collections.abc import Callable

import pygraphviz
import pytest
from drawn_graphs import Builder, flat, irregular, labels, plan_of, transformer, words

from lightning_cco.drawing import node_label
from lightning_cco.drawing.draw import draw_graph
from lightning_cco.drawing.fold_repeats import MAX_NODES, folded_view, whole_view
from lightning_cco.graph.layer import Layer
from lightning_cco.graph.layer_graph import LayerGraph

Mark = Callable[[Layer], object]


def counts(graph: LayerGraph, mark: Mark = lambda layer: None, **limits: int) -> list[tuple[str, int, int]]:
    return [(group.path, group.repeats, len(group.members)) for group in folded_view(graph, mark, **limits).groups]


def test_small_graphs_are_not_folded() -> None:
    graph = transformer(6)
    assert folded_view(graph, lambda layer: None) == whole_view(graph)


def test_repeated_blocks_are_shown_once() -> None:
    graph = transformer(12)
    view = folded_view(graph, lambda layer: None)
    assert [frame.label for frame in view.frames] == ["encoder.layer.[0-11] × 12"]
    assert [group.path for group in view.groups if group.repeats == 12] == [
        f"encoder.layer.[0-11]{rest}"
        for rest in (".attention.query", ".attention.key", ".attention.value", ".attention", ".attention.out", "", ".mlp.fc", ".mlp")
    ]
    assert len(view.groups) == 8 + 5
    # No edge leads back, from a block to the next; what leaves the last block starts at its picture.
    order = [group.key for group in view.groups]
    assert all(order.index(source) < order.index(destination) for source, destination in view.edges)
    assert ("gelu", graph.names[-2]) in view.edges


def test_a_block_that_differs_is_shown_between_the_others() -> None:
    view = folded_view(transformer(12, odd=4), lambda layer: None)
    assert [frame.label for frame in view.frames] == ["encoder.layer.[0-3] × 4", "encoder.layer.[5-11] × 7"]


def test_a_decision_that_differs_is_not_hidden() -> None:
    graph = transformer(12)
    special = next(layer.name for layer in graph if layer.path == "encoder.layer.7.mlp.fc")
    drawn = draw_graph(graph, plan_of(graph, {special: "setting"}), fold=True)
    assert special in labels(drawn)
    assert [box.get_label() for box in drawn.get_subgraphs() if "× 7" in box.get_label()]
    assert [box.get_label() for box in drawn.get_subgraphs() if "× 4" in box.get_label()]


def test_branches_side_by_side_are_not_a_repetition() -> None:
    b = Builder()
    x = b.add("input")
    for branch in range(20):
        y = x
        for step in range(4):
            y = b.add("conv", y, path=f"heads.{branch}.conv{step}", stride=step)
        b.add("output", y)
    assert all(group.repeats == 1 for group in folded_view(b.graph(), lambda layer: None).groups)


def test_the_worst_qs_of_the_repeated_blocks_is_shown() -> None:
    graph = transformer(12)
    qs = {layer.name: 5.0 for layer in graph} | {layer.name: 777.0 for layer in graph if layer.path == "encoder.layer.9.mlp.fc"}
    drawn = labels(draw_graph(graph, plan_of(graph), qs, fold=True))
    assert [name for name, label in drawn.items() if "QS 777 worst of 12" in label] == [
        next(layer.name for layer in graph if layer.path == "encoder.layer.0.mlp.fc")
    ]


@pytest.mark.parametrize(
    "graph",
    [
        pytest.param(transformer(150), id="transformer-of-1200"),
        pytest.param(irregular(100, 12), id="irregular-of-1200"),
        pytest.param(flat(1100), id="no-modules"),
    ],
)
def test_huge_nets_fit_and_nothing_is_lost(graph: LayerGraph) -> None:
    view = folded_view(graph, lambda layer: None)
    assert len(view.groups) <= MAX_NODES
    members = [name for group in view.groups for name in group.members]
    assert sorted(members) == sorted(graph.names)
    keys = {group.key for group in view.groups}
    assert {end for edge in view.edges for end in edge} <= keys
    assert len(keys) == len(view.groups)


def test_modules_fold_the_deepest_first() -> None:
    view = folded_view(irregular(100, 12), lambda layer: None, max_nodes=150)
    assert {group.path.count(".") for group in view.groups if not group.is_layer} == {2}  # net.stage.block, not net.stage


def test_a_module_called_between_others_does_not_become_one_node() -> None:
    """One node for the ReLU that a residual block calls three times would have edges from it to the convolutions and back."""
    b = Builder()
    x = b.add("input")
    for k in range(30):
        before = x
        for j in range(3):
            x = b.add("relu", b.add("conv", x, path=f"net.block{k}.conv{j}", out_channels=10 * k + j), path=f"net.block{k}.relu")
        x = b.add("relu", b.add("add", x, before, path=f"net.block{k}"), path=f"net.block{k}.relu")
    b.add("output", x)
    view = folded_view(b.graph(), lambda layer: None, max_nodes=40)
    assert len(view.groups) <= 40
    order = [group.key for group in view.groups]
    assert all(order.index(source) < order.index(destination) for source, destination in view.edges)
    assert not any("relu" in group.path and len(group.members) > 1 for group in view.groups)


@pytest.mark.parametrize("outputs", [3, 16])
def test_many_outputs_of_one_node_are_one(outputs: int) -> None:
    b = Builder()
    x = b.add("input")
    for number in range(70):
        x = b.add("relu", b.add("conv", x, path=f"net.conv{number}", out_channels=number + 1), path=f"net.relu{number}")
    for _ in range(outputs):
        b.add("output", x)
    graph = b.graph()
    ends = [group for group in folded_view(graph, lambda layer: None).groups if "output" in group.key]
    assert [len(group.members) for group in ends] == ([16] if outputs == 16 else [1, 1, 1])
    drawn = words(labels(draw_graph(graph, plan_of(graph), fold=True))["output_0"])
    assert ("16 outputs" in drawn) == (outputs == 16)
    assert "quantized" not in drawn


def test_a_folded_module_counts_its_decisions() -> None:
    graph = irregular(100, 12)
    block = [layer.name for layer in graph if ".block7." in layer.path]
    plan = plan_of(graph, {block[0]: "engine", block[1]: "engine", block[2]: "setting"})
    drawn = labels(draw_graph(graph, plan, {block[5]: 20_000.0}, fold=True, max_nodes=150))
    label = drawn[block[0]] + words(drawn[block[0]])
    for text in (
        "net.stage0.block7",
        "12 layers",
        "9 of 12 with weights in INT8",
        "not quantized: 2 in float in this engine, 1 as your recipe says",
        f"QS 20,000 in {block[5]}",
        node_label.RED,
    ):
        assert text in label


def test_an_input_that_many_far_layers_read_is_copied_beside_them() -> None:
    graph = transformer(40)
    parsed = pygraphviz.AGraph(string=draw_graph(graph).to_string())
    readers = [edge.destination for edge in graph.edges if edge.source == "input_0"]
    # networkx or not, each reader still has its edge, from the input itself or from a copy of it.
    sources = {reader: {str(source) for source in parsed.predecessors(reader)} for reader in readers}
    assert all(any(source.startswith("input_0") for source in found) for found in sources.values())
    assert parsed.out_degree("input_0") < len(readers) / 2


def test_a_folded_module_does_not_count_norms() -> None:
    b = Builder()
    x = b.add("input")
    for number in range(100):
        for kind in ("conv", "layer_norm"):
            x = b.add(kind, x, path=f"net.stage{number // 10}.block{number}.{kind}", size=number)
    b.add("output", x)
    graph = b.graph()
    norms = {layer.name: "unsupported" for layer in graph if layer.kind == "layer_norm"}
    drawn = [words(label) for label in labels(draw_graph(graph, plan_of(graph, norms), fold=True, max_nodes=150)).values()]
    assert any("1 of 1 with weights in INT8" in label for label in drawn) or any(
        "10 of 10 with weights in INT8" in label for label in drawn
    )
    assert not any("of 20" in label or "of 2 with" in label for label in drawn)
