"""LayerGraph against networkx on random graphs, and what a person who mistypes is told."""

from __future__ import annotations

from itertools import pairwise

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.graph.layer import Edge, Layer
from lightning_cco.graph.layer_graph import LayerGraph


@st.composite
def graphs(draw: st.DrawFn) -> tuple[LayerGraph, nx.DiGraph]:
    """A random acyclic graph with 1 to 3 inputs and outputs, in both forms; some layers are read by nobody."""
    inputs = [f"input_{i}" for i in range(draw(st.integers(1, 3)))]
    inner = [f"layer_{i}" for i in range(draw(st.integers(0, 14)))]
    outputs = [f"output_{i}" for i in range(draw(st.integers(1, 3)))]
    reference = nx.DiGraph()
    reference.add_nodes_from([*inputs, *inner, *outputs])
    for position, name in enumerate(inner):
        for before in draw(st.lists(st.sampled_from(inputs + inner[:position]), max_size=3)):
            reference.add_edge(before, name)
    for name in outputs:
        for before in draw(st.lists(st.sampled_from(inputs + inner), min_size=1, max_size=2)):
            reference.add_edge(before, name)
    weighted = draw(st.sets(st.sampled_from(inner))) if inner else set()
    layers = [
        *(Layer(name, "", "input") for name in inputs),
        *(Layer(name, "", "conv", weighted=name in weighted) for name in inner),
        *(Layer(name, "", "output") for name in outputs),
    ]
    order = draw(st.permutations(list(reference.edges)))
    return LayerGraph(layers, [Edge(source, destination) for source, destination in order]), reference


@given(graphs())
def test_reachability_is_that_of_networkx(both: tuple[LayerGraph, nx.DiGraph]) -> None:
    graph, reference = both
    for name in graph.names:
        assert graph.descendants(name) == nx.descendants(reference, name) | {name}
        assert graph.ancestors([name]) == nx.ancestors(reference, name) | {name}
        assert set(graph.predecessors(name)) == set(reference.predecessors(name))
        assert set(graph.successors(name)) == set(reference.successors(name))
        assert graph.downstream(name) == {other for other in nx.descendants(reference, name) | {name} if not other.startswith("output_")}


@given(graphs())
def test_tail_is_what_reaches_an_output_past_no_further_weight(both: tuple[LayerGraph, nx.DiGraph]) -> None:
    graph, reference = both
    # From the definition: without the weighted layers other than the layer itself, an output is still reachable from it; of the weighted ones only the last,
    # which no other one reads, and of the others what comes after these, or after none.
    weighted = {layer.name for layer in graph if layer.weighted}
    markers = set(graph.outputs)
    ends = [o for o in graph.outputs if all(set(reference.successors(p)) <= markers for p in reference.predecessors(o))] or graph.outputs
    expected = set()
    for output in ends:
        reaching = {
            layer.name
            for layer in graph
            if layer.kind == "conv" and nx.has_path(reference.subgraph(set(reference) - (weighted - {layer.name})), layer.name, output)
        }
        before = reaching & weighted
        last = {name for name in before if not any(nx.has_path(reference, name, other) for other in before - {name})}
        for name in reaching:
            above = nx.ancestors(reference, name) | {name}
            if above & last or (before == last or not above & weighted):
                expected.add(name)
    assert graph.tail() == expected


def test_the_residual_stream_of_a_model_without_a_head_is_no_tail() -> None:
    """Three residual blocks, then the output: what only the last block adds, and the sum."""
    names = [f"{kind}_{block}" for block in range(3) for kind in ("up", "down", "sum")]
    layers = [Layer(name, "", "conv", weighted=not name.startswith("sum")) for name in names]
    edges = [Edge("input_0", "up_0"), Edge("input_0", "sum_0"), Edge("sum_2", "output_0")]
    for block in range(3):
        edges += [Edge(f"up_{block}", f"down_{block}"), Edge(f"down_{block}", f"sum_{block}")]
        if block:
            edges += [Edge(f"sum_{block - 1}", f"up_{block}"), Edge(f"sum_{block - 1}", f"sum_{block}")]
    graph = LayerGraph([Layer("input_0", "", "input"), *layers, Layer("output_0", "", "output")], edges)
    assert graph.tail() == {"down_2", "sum_2"}


@settings(max_examples=60)
@given(graphs(), st.data())
def test_between_is_the_union_of_all_paths(both: tuple[LayerGraph, nx.DiGraph], data: st.DataObject) -> None:
    graph, reference = both
    starts = [name for name in graph.names if nx.descendants(reference, name)]
    if not starts:
        return
    start = data.draw(st.sampled_from(starts))
    until = data.draw(st.lists(st.sampled_from(sorted(nx.descendants(reference, start))), min_size=1, max_size=3, unique=True))
    on_paths = {name for destination in until for path in nx.all_simple_paths(reference, start, destination) for name in path}
    assert graph.between(start, until) == on_paths - set(until)


def small() -> LayerGraph:
    """input → conv, relu in `block.0` → conv_1 in `block.1` and a side branch `add` → linear → output."""
    layers = [
        Layer("input_0", "", "input"),
        Layer("conv", "block.0.conv1", "conv", ((1, 3, 8, 8),), ((1, 4, 8, 8),), weighted=True),
        Layer("relu", "block.0", "relu"),
        Layer("conv_1", "block.1.conv1", "conv", weighted=True),
        Layer("add", "", "add"),
        Layer("linear", "head", "linear", weighted=True),
        Layer("linear_1", "linear", "linear", weighted=True),
        Layer("output_0", "", "output"),
    ]
    names = ["input_0", "conv", "relu", "conv_1", "add", "linear", "linear_1", "output_0"]
    chain = [Edge(*pair) for pair in pairwise(names)]
    return LayerGraph(layers, [*chain, Edge("relu", "add", destination_input=1)])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        pytest.param("conv_1", ["conv_1"], id="name"),
        pytest.param("block.0.conv1", ["conv"], id="path"),
        pytest.param("block.0", ["conv", "relu"], id="path-and-container"),
        pytest.param("block", ["conv", "relu", "conv_1"], id="container"),
        pytest.param("conv*", ["conv", "conv_1"], id="glob-over-names"),
        pytest.param("block.*.conv1", ["conv", "conv_1"], id="glob-over-paths"),
        pytest.param("blo[a-c]k", ["conv", "relu", "conv_1"], id="glob-over-containers"),
        pytest.param("*", ["input_0", "conv", "relu", "conv_1", "add", "linear", "linear_1"], id="glob-leaves-outputs-out"),
        pytest.param("output_0", ["output_0"], id="output-by-name"),
        pytest.param("path:linear", ["linear_1"], id="forced-path"),
        pytest.param("path:*.conv1", ["conv", "conv_1"], id="forced-path-glob"),
    ],
)
def test_select(pattern: str, expected: list[str]) -> None:
    assert small().select(pattern) == expected


def test_select_takes_the_name_where_a_path_reads_the_same() -> None:
    with pytest.warns(CCOWarning, match=r"'linear'.*called in 'head'.*calls 'linear_1'.*'path:linear'"):
        assert small().select("linear") == ["linear"]


def test_select_is_silent_when_name_and_path_are_the_same_layer() -> None:
    graph = LayerGraph([Layer("conv", "conv", "conv")], [])
    assert graph.select("conv") == ["conv"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        pytest.param("convv_1", "No layer name or module path is 'convv_1'. Did you mean 'conv_1'", id="name-typo"),
        pytest.param("block.0.conv", "Did you mean 'block.0.conv1'", id="path-typo"),
        pytest.param("model.block.1.conv1", "Did you mean 'block.1.conv1'", id="outer-module-too-many"),
        pytest.param("1.conv1", "Did you mean 'block.1.conv1'", id="outer-module-missing"),
        pytest.param("Conv_1", "Did you mean 'conv_1'", id="case"),
        pytest.param("blok.*.conv1", "matches 'blok.*.conv1'. Did you mean 'block.", id="glob"),
        pytest.param("path:conv_1", "write 'conv_1' without 'path:'", id="name-forced-as-path"),
        pytest.param("zzzzzz", "There are, for example, 'input_0', 'conv'", id="nothing-near"),
        pytest.param("path:zzzzzz", "There are, for example, 'block', 'head', 'linear'", id="no-path-near"),
        pytest.param("", "selects no layer", id="empty"),
        pytest.param("output_*", "Did you mean 'output_0'", id="outputs-by-glob"),
    ],
)
def test_select_says_what_to_write(pattern: str, message: str) -> None:
    with pytest.raises(CCOError) as caught:
        small().select(pattern)
    assert message in str(caught.value)


def test_lookup_says_what_to_write() -> None:
    graph = small()
    assert graph["conv_1"].path == "block.1.conv1"
    with pytest.raises(CCOError, match=r"no layer named 'convv_1'.*Did you mean 'conv_1'"):
        graph["convv_1"]
    with pytest.raises(CCOError, match=r"'block.0' is a module path.*'conv', 'relu'.*graph.select\('block.0'\)"):
        graph["block.0"]


@pytest.mark.parametrize(
    ("start", "until", "message"),
    [
        pytest.param("conv_1", ["relu"], "It lies upstream: write 'conv_1' as the destination of 'relu'", id="upstream"),
        pytest.param("linear", ["linear_1", "add"], "'add' can't be reached from 'linear'", id="one-of-several"),
        pytest.param("relu", ["relu"], "can't be its own destination", id="itself"),
        pytest.param("relu", [], "No destination is given", id="none"),
        pytest.param("relu", ["conv_2"], "Did you mean 'conv_1'", id="unknown"),
        pytest.param("reluu", ["linear"], "Did you mean 'relu'", id="unknown-start"),
    ],
)
def test_between_says_what_is_wrong(start: str, until: list[str], message: str) -> None:
    with pytest.raises(CCOError) as caught:
        small().between(start, until)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("names", "edges", "message"),
    [
        pytest.param(["a", "b", "a"], [], "Two layers are named 'a'", id="duplicate"),
        pytest.param(["a", "b"], [("a", "c")], "'a' → 'c' ends at an unknown layer, 'c'", id="unknown-end"),
        pytest.param(["a", "b", "c", "d"], [("a", "b"), ("b", "c"), ("c", "b"), ("c", "d")], "c → b → c", id="cycle"),
        pytest.param(["a"], [("a", "a")], "a → a", id="self-loop"),
    ],
)
def test_constructor_refuses(names: list[str], edges: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(CCOError) as caught:
        LayerGraph([Layer(name, "", "relu") for name in names], [Edge(*edge) for edge in edges])
    assert message in str(caught.value)


def test_container_protocol_and_order() -> None:
    graph = LayerGraph([Layer("output_0", "", "output"), Layer("relu", "", "relu"), Layer("input_0", "", "input")], [])
    assert graph.names == ("input_0", "relu", "output_0")
    assert (graph.inputs, graph.outputs) == (("input_0",), ("output_0",))
    assert "relu" in graph
    assert "conv" not in graph
    assert [layer.name for layer in graph] == list(graph.names)
    assert len(graph) == 3


def test_print_shows_every_layer_with_path_shapes_and_sources() -> None:
    lines = str(small()).splitlines()
    conv = next(line for line in lines if line.startswith("conv "))
    assert conv.split() == ["conv", "block.0.conv1", "1×3×8×8", "→", "1×4×8×8", "input_0"]
    assert len(lines) == 2 + len(small())
    assert "8 layers, 8 edges" in repr(small())


def test_queries_look_at_each_edge_a_bounded_number_of_times() -> None:
    """20,000 layers in residual pairs have 2**10,000 paths: anything but a search that marks what it has seen never ends."""
    count = 20_000
    names = [f"conv_{i}" for i in range(count)]
    layers = [Layer(name, f"stage.{i // 20}.conv{i % 20}", "conv", weighted=i % 5 < 2) for i, name in enumerate(names)]
    edges = [Edge(names[i], names[j]) for i in range(count) for j in (i + 1, i + 2) if j < count]
    graph = LayerGraph([*layers, Layer("output_0", "", "output")], [*edges, Edge(names[-1], "output_0")])
    assert len(graph.between("conv_0", [f"conv_{i}" for i in range(1, count, 2)])) == count // 2
    assert len(graph.downstream("conv_10")) == count - 10
    assert graph.tail() == {f"conv_{i}" for i in range(count - 4, count)}
    assert len(graph.select("stage.*.conv3")) == count // 20
