"""The picture: which nodes, colours and texts it has."""

from __future__ import annotations

import re
from dataclasses import replace
from textwrap import wrap
from types import SimpleNamespace
from xml.etree import ElementTree

import pygraphviz
import pytest
from drawn_graphs import cnn, labels, plan_of, words
from hypothesis import given
from hypothesis import strategies as st

from lightning_cco.drawing import node_label
from lightning_cco.drawing.draw import draw_graph
from lightning_cco.graph.layer import Edge, Layer
from lightning_cco.graph.layer_graph import LayerGraph


def test_every_layer_and_edge_is_drawn_also_a_layer_without_edges() -> None:
    graph = cnn()
    parsed = pygraphviz.AGraph(string=draw_graph(graph).to_string())
    assert {str(node) for node in parsed.nodes()} == set(graph.names)
    assert set(parsed.edges()) == {(edge.source, edge.destination) for edge in graph.edges}


def test_colours_follow_the_plan() -> None:
    graph = cnn()
    drawn = labels(draw_graph(graph, plan_of(graph, {"linear": "tail", "dropout": "unsupported"})))
    fills = {name: re.search(r'BGCOLOR="(#\w+)"', label)[1] for name, label in drawn.items()}  # type: ignore[index]
    blue, green, yellow, white = (paint.fill for paint in (node_label.BLUE, node_label.GREEN, node_label.YELLOW, node_label.WHITE))
    assert fills == {
        "input_0": blue, "conv": green, "relu": green, "flatten": green, "linear": yellow, "dropout": white, "output_0": blue,
    }  # fmt: skip


def test_without_a_plan_inputs_and_outputs_are_blue_and_the_others_white() -> None:
    drawn = labels(draw_graph(cnn()))
    for name, label in drawn.items():
        fill = node_label.BLUE.fill if name in ("input_0", "output_0") else node_label.WHITE.fill
        assert f'BGCOLOR="{fill}"' in label


def test_a_node_tells_name_type_path_shapes_attributes_bits_reason_and_qs() -> None:
    graph = cnn()
    drawn = labels(draw_graph(graph, plan_of(graph, {"linear": "tail"}), qs={"conv": 12.34, "linear": 20_000.0}))
    for text in ("<B>conv</B>", "Conv", "stem.conv", "2×8×4×4 → 2×8×4×4", "kernel_size 3×3", "stride 2×2", "W4 A8", "QS 12.3"):
        assert text in drawn["conv"]
    assert "result rounded to 8 bits: tail of the model" in words(drawn["linear"])
    assert "<B>A8</B>" in drawn["linear"]  # in float itself, but its output is rounded for what reads it
    assert "W4" not in drawn["linear"]
    assert f'COLOR="{node_label.RED}"><B>QS 20,000' in drawn["linear"]
    assert node_label.RED not in drawn["conv"]


def test_what_the_engine_cannot_do_is_said_in_full() -> None:
    graph = cnn()
    plan = plan_of(graph, {"relu": "engine", "linear": "tail"})
    plan.decisions["relu"] = replace(
        plan.decisions["relu"], detail="relu is computed in float by an engine whose name is so long that it takes two lines"
    )
    drawn = labels(draw_graph(graph, plan))
    assert plan.decisions["relu"].detail in words(drawn["relu"])
    assert "why linear" not in drawn["linear"]  # a word is enough; the rest is in the tooltip


@pytest.mark.parametrize("width", [20, 34, 52])
@given(st.lists(st.text("abcdefgh", min_size=1, max_size=12), min_size=1, max_size=30))
def test_lines_are_as_few_as_they_can_be_and_about_equally_long(width: int, words: list[str]) -> None:
    lines = node_label.balanced(" ".join(words), width)
    assert " ".join(lines).split() == words
    assert max(map(len, lines)) <= width
    assert len(lines) == len(wrap(" ".join(words), width))
    # No narrower column would do: else the last line could be longer.
    narrower = max(map(len, lines)) - 1
    assert narrower < max(map(len, words)) or len(wrap(" ".join(words), narrower)) > len(lines)


def test_texts_and_bars_keep_off_the_border() -> None:
    graph = cnn()
    dot = draw_graph(graph, plan_of(graph, {"linear": "tail"}), qs={"conv": 12.0, "relu": 3.0})
    svg = ElementTree.fromstring(pygraphviz.AGraph(string=dot.to_string()).draw(format="svg", prog="dot"))
    space = "{http://www.w3.org/2000/svg}"
    nodes = [group for group in svg.iter(f"{space}g") if group.get("class") == "node"]
    assert len(nodes) == len(graph)
    for node in nodes:
        border = [float(number) for number in re.findall(r"-?[\d.]+", next(node.iter(f"{space}path")).get("d", ""))][::2]
        for text in node.iter(f"{space}text"):
            assert float(text.get("x", "0")) >= min(border) + 5
        for bar in node.iter(f"{space}polygon"):
            corners = [float(corner.split(",")[0]) for corner in bar.get("points", "").split()]
            height = {float(corner.split(",")[1]) for corner in bar.get("points", "").split()}
            if max(height) - min(height) > 2:  # not the line between head and body
                assert max(corners) <= max(border) - 3


@pytest.mark.parametrize(
    ("qs", "threshold", "red"),
    [
        pytest.param(100.0, 100.0, False, id="at-the-threshold"),
        pytest.param(100.1, 100.0, True, id="above"),
        pytest.param(1e9, None, False, id="no-threshold"),
        pytest.param(float("nan"), None, True, id="nan"),
        pytest.param(float("inf"), 100.0, True, id="infinite"),
        pytest.param(0.0, 100.0, False, id="zero"),
    ],
)
def test_red_means_above_the_threshold(qs: float, threshold: float | None, red: bool) -> None:
    graph = cnn()
    label = labels(draw_graph(graph, plan_of(graph, threshold=threshold), qs={"conv": qs}))["conv"]
    assert (node_label.RED in label) == red


def test_a_boundary_seen_through_a_value_preserving_layer_is_dashed_at_its_reader() -> None:
    graph = cnn()
    plan = plan_of(graph, {"linear": "tail"})
    plan.boundaries = [SimpleNamespace(source="relu", destination="linear")]
    parsed = pygraphviz.AGraph(string=draw_graph(graph, plan).to_string())
    assert [edge for edge in parsed.edges() if edge.attr["style"] == "dashed"] == [("flatten", "linear")]


def test_texts_of_users_do_not_break_the_label() -> None:
    layers = [Layer("conv", 'a<b>&"c"', "conv", attributes={"mode": '<&>"\\'}), Layer('<no> "de"-1', "", "x y")]
    dot = draw_graph(LayerGraph(layers, [Edge("conv", '<no> "de"-1')]), title="<i>&")
    svg = pygraphviz.AGraph(string=dot.to_string()).draw(format="svg", prog="dot")
    texts = "".join(ElementTree.fromstring(svg).itertext())
    for text in ('a<b>&"c"', '<&>"\\', '<no> "de"-1', "<i>&"):
        assert text in texts
