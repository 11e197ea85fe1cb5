"""The files that Graphviz makes of a picture, and that they never stop a training."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pygraphviz
import pytest
from drawn_graphs import cnn, flat, plan_of, transformer

from lightning_cco.drawing import fonts
from lightning_cco.drawing import render as render_module
from lightning_cco.drawing.draw import draw_graph
from lightning_cco.drawing.overview import draw_overview
from lightning_cco.drawing.render import render, render_png_bytes, save_pictures
from lightning_cco.errors import CCOWarning
from lightning_cco.graph.layer import Edge, Layer
from lightning_cco.graph.layer_graph import LayerGraph


@pytest.fixture(autouse=True)
def _forget_warnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(render_module, "_warned", set())
    monkeypatch.setattr(render_module, "_too_large", {})
    return


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
    data = render_png_bytes(draw_graph(flat(400)))
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
    dot = draw_graph(LayerGraph([Layer("i" * 30, "", ""), Layer("W" * 30, "", "")], []))
    widths = text_widths(render(dot, tmp_path / "a", formats=("svg",))["svg"].read_bytes())
    assert widths["W" * 30] > 2 * widths["i" * 30]  # without a font, every letter is the same box


def without_graphviz(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render_module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(render_module.shutil, "which", lambda name: None)


def test_without_graphviz_the_dot_file_is_written_and_one_warning_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_graphviz(monkeypatch)
    dot = draw_graph(cnn())
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
    written = render(draw_graph(cnn()), tmp_path / "a", formats=("svg",))
    assert written["svg"].read_text() == "-Tsvgdigraph"


def test_a_layout_that_takes_too_long_is_stopped_and_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render_module, "_CHILD", "import time; time.sleep(60)")
    dot = draw_graph(cnn())
    with pytest.warns(CCOWarning, match=r"more than 0.2 s for a svg"):
        assert list(render(dot, tmp_path / "a", formats=("svg", "dot"), timeout=0.2)) == ["dot"]
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("tried again"))
    assert list(render(dot, tmp_path / "a", formats=("svg", "dot"))) == ["dot"]


def test_a_crash_of_graphviz_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render_module, "_CHILD", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr(render_module.shutil, "which", lambda name: None)
    with pytest.warns(CCOWarning, match=r"could not draw a png.*exit status -11"):
        assert render_png_bytes(draw_graph(cnn())) is None


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(CCOWarning, match=r"can't be written.*output_dir"):
        assert render(draw_graph(cnn()), tmp_path / "file" / "a", formats=("dot",)) == {}


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    render(draw_graph(cnn()), tmp_path / "a")
    assert capfd.readouterr() == ("", "")


def test_graphviz_reads_a_module_of_thousands_of_layers() -> None:
    """Its strings end at 16,384 bytes: the loops of a detector, unrolled."""
    names = [f"операция_{number}" for number in range(3000)]
    kinds = ("mul", "sub", "add", "div")
    layers = [
        Layer(name, "net.postprocess", kinds[(number * number) % 4], ((1,),), ((1,),), ("float32",)) for number, name in enumerate(names)
    ]
    graph = LayerGraph(layers, [Edge(a, b) for a, b in pairwise(names)])
    plan = plan_of(graph)
    for dot in (draw_graph(graph, plan, fold=True), draw_overview(graph, plan)):
        assert pygraphviz.AGraph(string=dot.to_string()).number_of_nodes() > 0
