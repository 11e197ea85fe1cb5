"""The picture: which nodes, colours and texts it has, what folds, and that it never stops a training."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pygraphviz
import pytest

from lightning_cco.errors import CCOWarning
from lightning_cco.graph import fonts, node_label
from lightning_cco.graph import render as render_module
from lightning_cco.graph.draw import draw_graph
from lightning_cco.graph.fold import MAX_NODES, folded_view, whole_view
from lightning_cco.graph.layer import Edge, Layer
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.graph.render import render, render_png_bytes, save_pictures

Mark = Callable[[Layer], object]


class Builder:
    """Writes graphs down layer by layer."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.edges: list[Edge] = []

    def add(self, kind: str, *sources: str, path: str = "", **attributes: object) -> str:
        count = sum(layer.kind == kind for layer in self.layers)
        name = f"{kind}_{count}" if count or kind in ("input", "output") else kind
        weighted = kind in ("conv", "linear")
        shapes = ((2, 8, 4, 4),)
        outputs = () if kind == "output" else shapes
        self.layers.append(
            Layer(
                name,
                path,
                kind,
                shapes * len(sources),
                outputs,
                attributes=attributes,
                parameters=(f"{path}.weight",) * weighted,
                weighted=weighted,
            )
        )
        self.edges += [Edge(source, name) for source in sources]
        return name

    def graph(self) -> LayerGraph:
        return LayerGraph(self.layers, self.edges)


def cnn() -> LayerGraph:
    b = Builder()
    x = b.add("conv", b.add("input"), path="stem.conv", kernel_size=(3, 3), stride=(2, 2))
    x = b.add("relu", x, path="stem")
    x = b.add("flatten", x)
    b.add("output", b.add("linear", x, path="head", out_features=10))
    b.add("dropout", path="unused")  # no edge
    return b.graph()


def transformer(blocks: int, odd: int | None = None) -> LayerGraph:
    """Blocks of 8 layers: query, key, value, a product, a projection, a residual sum, a feed-forward part; block ``odd`` differs."""
    b = Builder()
    mask = b.add("input")
    x = b.add("linear", b.add("input"), path="embed")
    for k in range(blocks):
        p = f"encoder.layer.{k}"
        q, key, v = (
            b.add("linear", x, path=f"{p}.attention.{part}", out_features=9 if k == odd else 8) for part in ("query", "key", "value")
        )
        y = b.add("attention", q, key, v, mask, path=f"{p}.attention")
        y = b.add("linear", y, path=f"{p}.attention.out")
        x = b.add("add", x, y, path=p)
        x = b.add("gelu", b.add("linear", x, path=f"{p}.mlp.fc"), path=f"{p}.mlp")
    b.add("output", b.add("linear", x, path="head"))
    return b.graph()


def plan_of(graph: LayerGraph, skipped: dict[str, str] | None = None, threshold: float | None = 10_000.0) -> Any:
    """A stand-in for a QuantizationPlan."""
    reasons = dict.fromkeys(graph.outputs, "output") | (skipped or {})
    decisions = {
        layer.name: SimpleNamespace(
            quantized=layer.name not in reasons,
            reason=reasons.get(layer.name, ""),
            detail=f"why {layer.name}" if layer.name in reasons else "",
            weights_num_bits=4 if layer.weighted and layer.name not in reasons else None,
            activations_num_bits=8,
        )
        for layer in graph
    }
    settings = SimpleNamespace(global_quantization_settings=SimpleNamespace(quantization_sensitivity_threshold=threshold))
    return SimpleNamespace(decisions=decisions, settings=settings, boundaries=[], counted=len(graph) - len(graph.outputs))


def labels(dot: Any) -> dict[str, str]:
    """HTML label of each node, read from the DOT text by Graphviz's own parser."""
    parsed = pygraphviz.AGraph(string=dot.to_string())
    return {str(node): node.attr["label"] for node in parsed.nodes()}


@pytest.fixture(autouse=True)
def _forget_warnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(render_module, "_warned", set())
    monkeypatch.setattr(render_module, "_too_large", {})
    return


def test_every_layer_and_edge_is_drawn_also_a_layer_without_edges() -> None:
    graph = cnn()
    parsed = pygraphviz.AGraph(string=graph.to_pydot().to_string())
    assert {str(node) for node in parsed.nodes()} == set(graph.names)
    assert set(parsed.edges()) == {(edge.source, edge.destination) for edge in graph.edges}


def test_colours_follow_the_plan() -> None:
    graph = cnn()
    drawn = labels(draw_graph(graph, plan_of(graph, {"linear": "tail", "dropout": "unsupported"})))
    fills = {name: re.search(r'BGCOLOR="(#\w+)"', label)[1] for name, label in drawn.items()}  # type: ignore[index]
    blue, green, yellow = node_label.BLUE.fill, node_label.GREEN.fill, node_label.YELLOW.fill
    assert fills == {
        "input_0": blue, "conv": green, "relu": green, "flatten": green, "linear": yellow, "dropout": yellow, "output_0": blue,
    }  # fmt: skip


def test_without_a_plan_inputs_and_outputs_are_blue_and_the_others_white() -> None:
    drawn = labels(cnn().to_pydot())
    for name, label in drawn.items():
        fill = node_label.BLUE.fill if name in ("input_0", "output_0") else node_label.WHITE.fill
        assert f'BGCOLOR="{fill}"' in label


def test_a_node_tells_name_type_path_shapes_attributes_bits_reason_and_qs() -> None:
    graph = cnn()
    drawn = labels(draw_graph(graph, plan_of(graph, {"linear": "tail"}), qs={"conv": 12.34, "linear": 20_000.0}))
    for text in ("<B>conv</B>", "Conv", "stem.conv", "2×8×4×4 → 2×8×4×4", "kernel_size 3×3", "stride 2×2", "W4 A8", "QS 12.3"):
        assert text in drawn["conv"]
    assert "not quantized: tail" in drawn["linear"]
    assert "<B>A8</B>" in drawn["linear"]  # in float itself, but its output is rounded for what reads it
    assert "W4" not in drawn["linear"]
    assert f'COLOR="{node_label.RED}"><B>QS 20,000' in drawn["linear"]
    assert node_label.RED not in drawn["conv"]


def test_what_the_engine_cannot_do_is_said_in_full() -> None:
    graph = cnn()
    plan = plan_of(graph, {"relu": "rule", "linear": "tail"})
    plan.decisions["relu"].detail = "relu is computed in float by an engine whose name is so long that it takes two lines"
    drawn = labels(draw_graph(graph, plan))
    assert "not quantized: relu is computed in float by an" in drawn["relu"]
    assert "long that it takes two lines" in drawn["relu"]
    assert "why linear" not in drawn["linear"]  # a word is enough; the rest is in the tooltip


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


def irregular(blocks: int, layers_each: int) -> LayerGraph:
    """A deep net in which no two layers are alike."""
    b = Builder()
    x = b.add("input")
    for k in range(blocks):
        for j in range(layers_each):
            x = b.add("conv", x, path=f"net.stage{k // 10}.block{k}.conv{j}", out_channels=1000 * k + j)
    b.add("output", x)
    return b.graph()


def flat(count: int) -> LayerGraph:
    b = Builder()
    x = b.add("input")
    for k in range(count):
        x = b.add("mul", x, by=k)
    b.add("output", x)
    return b.graph()


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


def test_a_folded_module_counts_its_decisions() -> None:
    graph = irregular(100, 12)
    block = [layer.name for layer in graph if ".block7." in layer.path]
    plan = plan_of(graph, {block[0]: "rule", block[1]: "rule", block[2]: "setting"})
    drawn = labels(draw_graph(graph, plan, {block[5]: 20_000.0}, fold=True, max_nodes=150))
    label = drawn[block[0]]
    for text in ("net.stage0.block7", "12 layers", "9 of 12 quantized", "2 rule, 1 setting", f"QS 20,000 in {block[5]}", node_label.RED):
        assert text in label


def test_an_input_that_many_far_layers_read_is_copied_beside_them() -> None:
    graph = transformer(40)
    parsed = pygraphviz.AGraph(string=graph.to_pydot().to_string())
    readers = [edge.destination for edge in graph.edges if edge.source == "input_0"]
    # networkx or not, each reader still has its edge, from the input itself or from a copy of it.
    sources = {reader: {str(source) for source in parsed.predecessors(reader)} for reader in readers}
    assert all(any(source.startswith("input_0") for source in found) for found in sources.values())
    assert parsed.out_degree("input_0") < len(readers) / 2


def test_files_are_written(tmp_path: Path) -> None:
    graph = cnn()
    written = render(draw_graph(graph, plan_of(graph), {"conv": 3.0}, title="A title"), tmp_path / "new" / "model.init")
    assert {name: path.name for name, path in written.items()} == {
        "svg": "model.init.svg",
        "png": "model.init.png",
        "dot": "model.init.dot",
    }
    assert {path.name for path in (tmp_path / "new").iterdir()} == {path.name for path in written.values()}  # no temporary file left
    texts = "".join(ElementTree.parse(written["svg"]).getroot().itertext())
    assert all(name in texts for name in (*graph.names, "A title"))
    assert written["png"].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert {str(node) for node in pygraphviz.AGraph(str(written["dot"])).nodes()} == set(graph.names)


def test_saved_pictures_are_whole_as_svg_and_folded_as_png(tmp_path: Path) -> None:
    graph = transformer(40)
    written = save_pictures(graph, tmp_path / "model", plan_of(graph), {"linear": 3.0}, title="forty blocks")
    assert set(written) == {"svg", "png", "dot"}
    texts = set(ElementTree.parse(written["svg"]).getroot().itertext())
    assert {*graph.names, "forty blocks"} <= texts
    folded = render_png_bytes(draw_graph(graph, plan_of(graph), {"linear": 3.0}, fold=True, title="forty blocks"))
    assert written["png"].read_bytes() == folded


def png_size(data: bytes) -> tuple[int, int]:
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_a_png_has_bounded_sides() -> None:
    data = render_png_bytes(flat(400).to_pydot())
    assert data is not None
    assert render_module.MAX_PIXELS * 0.9 < png_size(data)[1] <= render_module.MAX_PIXELS


def text_widths(svg: bytes) -> dict[str, float]:
    """Width of the box around each node, by its title."""
    found = {}
    for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}g"):
        if node.get("class") == "node":
            path = next(node.iter("{http://www.w3.org/2000/svg}path"))
            numbers = [float(x) for x in re.findall(r"(-?[\d.]+),", path.get("d", ""))]
            found[node[0].text or ""] = max(numbers) - min(numbers)
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have fonts")
@pytest.mark.parametrize("source", ["matplotlib", "pillow"])
def test_letters_are_drawn_on_a_machine_without_fonts(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip({"matplotlib": "matplotlib", "pillow": "PIL"}[source])
    monkeypatch.delenv("FONTCONFIG_FILE", raising=False)
    monkeypatch.setattr(fonts, "SYSTEM_FONTS", ())
    if source == "pillow":
        monkeypatch.setattr(fonts, "_matplotlib_fonts", lambda: None)
    monkeypatch.setattr(render_module, "find_fonts", fonts.find_fonts.__wrapped__)
    dot = LayerGraph([Layer("i" * 30, "", ""), Layer("W" * 30, "", "")], []).to_pydot()
    widths = text_widths(render(dot, tmp_path / "a", formats=("svg",))["svg"].read_bytes())
    assert widths["W" * 30] > 2 * widths["i" * 30]  # without a font, every letter is the same box


def without_graphviz(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render_module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(render_module.shutil, "which", lambda name: None)


def test_without_graphviz_the_dot_file_is_written_and_one_warning_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_graphviz(monkeypatch)
    dot = cnn().to_pydot()
    with pytest.warns(CCOWarning, match=r"pip install 'pygraphviz>=2'") as caught:
        assert list(render(dot, tmp_path / "a", formats=("svg", "png"))) == ["dot"]
    assert len(caught) == 1
    assert (tmp_path / "a.dot").read_text().startswith("digraph")
    assert render_png_bytes(dot) is None  # warnings are errors here: the second one is silent


def test_the_dot_program_is_used_where_pygraphviz_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "dot"
    program.write_text(f'#!{sys.executable}\nimport sys\nsys.stdout.write(" ".join(sys.argv[1:]) + sys.stdin.read()[:7])\n')
    program.chmod(0o755)
    monkeypatch.setattr(render_module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(render_module.shutil, "which", lambda name: str(program))
    written = render(cnn().to_pydot(), tmp_path / "a", formats=("svg",))
    assert written["svg"].read_text() == "-Tsvgdigraph"


def test_a_layout_that_takes_too_long_is_stopped_and_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render_module, "_CHILD", "import time; time.sleep(60)")
    dot = cnn().to_pydot()
    with pytest.warns(CCOWarning, match=r"more than 0.2 s for a svg"):
        assert list(render(dot, tmp_path / "a", formats=("svg", "dot"), timeout=0.2)) == ["dot"]
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("tried again"))
    assert list(render(dot, tmp_path / "a", formats=("svg", "dot"))) == ["dot"]


def test_a_crash_of_graphviz_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render_module, "_CHILD", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr(render_module.shutil, "which", lambda name: None)
    with pytest.warns(CCOWarning, match=r"could not draw a png.*exit status -11"):
        assert render_png_bytes(cnn().to_pydot()) is None


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(CCOWarning, match=r"can't be written.*output_dir"):
        assert render(cnn().to_pydot(), tmp_path / "file" / "a", formats=("dot",)) == {}


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    render(cnn().to_pydot(), tmp_path / "a")
    assert capfd.readouterr() == ("", "")
