"""Writes pictures to disk; nothing here raises because a picture could not be made."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import pydot

from lightning_cco.drawing.draw import draw_graph
from lightning_cco.drawing.fonts import Fonts, find_fonts
from lightning_cco.drawing.overview import HEIGHT, WIDTH, draw_overview
from lightning_cco.errors import CCOWarning
from lightning_cco.files import write_file
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.quantization.plan import QuantizationPlan

MAX_PIXELS = 16_000  # a side of a PNG; cairo ends at 32,767 and viewers long before
DPI = 110
TIMEOUT = 60.0  # seconds for one picture

# Graphviz runs in a separate process: its C code is not thread-safe, prints font warnings to file descriptor 2, and on a graph that it
# can't cope with it runs for hours or crashes. None of that may reach a training. The first line keeps modules of the working directory
# from shadowing the standard library.
_CHILD = """
import sys; sys.path = [p for p in sys.path if p]
import pygraphviz
graph = pygraphviz.AGraph(string=sys.stdin.buffer.read().decode())
graph.graph_attr.update(item.split("=", 1) for item in sys.argv[2:])
sys.stdout.buffer.write(graph.draw(format=sys.argv[1], prog="dot"))
"""

_warned: set[str] = set()
_too_large: dict[str, int] = {}  # format -> size of the smallest graph whose layout was stopped, not to wait for it again each epoch


def render(
    dot: pydot.Dot,
    stem: Path | str,
    formats: Sequence[str] = ("svg", "png", "dot"),
    timeout: float = TIMEOUT,
    dot_instead: bool = True,
    pixels: tuple[int, int] = (MAX_PIXELS, MAX_PIXELS),
) -> dict[str, Path]:
    """Writes ``stem.svg``, ``stem.png`` and so on, each atomically, and returns the paths of those that could be written.

    A PNG has at most as many ``pixels``, in width and height.

    Emits a CCOWarning once per cause when one could not: no Graphviz, a layout that took longer than ``timeout`` seconds, a folder that
    can't be written. With ``dot_instead``, ``stem.dot`` is written in place of a picture that could not be drawn.
    """
    stem = Path(stem)
    text = dot.to_string()
    written: dict[str, Path] = {}
    wanted = list(dict.fromkeys(formats))
    for name in wanted:
        data = text.encode() if name == "dot" else _draw(text, name, timeout, pixels)
        if data is None:
            if dot_instead and "dot" not in wanted:
                wanted.append("dot")
            continue
        path = stem.with_name(f"{stem.name}.{name}")
        if _write(path, data):
            written[name] = path
    return written


def save_pictures(
    graph: LayerGraph,
    stem: Path | str,
    plan: QuantizationPlan | None = None,
    qs: Mapping[str, float] | None = None,
    title: str = "",
    rises: Mapping[str, float] | None = None,
) -> dict[str, Path]:
    """Writes a graph as ``stem.svg`` and ``stem.dot``, which are whole, and ``stem.png``, in which large graphs are folded."""
    written = render(draw_graph(graph, plan, qs, title=title, rises=rises), stem, ("svg", "dot"))
    return written | render(draw_graph(graph, plan, qs, fold=True, title=title, rises=rises), stem, ("png",), dot_instead=False)


def save_overview(
    graph: LayerGraph, stem: Path | str, plan: QuantizationPlan, qs: Mapping[str, float] | None = None, title: str = ""
) -> dict[str, Path]:
    """Writes ``stem.svg`` and ``stem.png``: the modules of a network of any size, on one screen."""
    return render(draw_overview(graph, plan, qs, title), stem, ("svg", "png"), dot_instead=False, pixels=(WIDTH, HEIGHT))


def render_png_bytes(dot: pydot.Dot, timeout: float = TIMEOUT) -> bytes | None:
    """Returns the picture as a PNG file, or None (and a CCOWarning, once per cause) when it can't be made."""
    return _draw(dot.to_string(), "png", timeout)


def _draw(text: str, name: str, timeout: float, pixels: tuple[int, int] = (MAX_PIXELS, MAX_PIXELS)) -> bytes | None:
    width, height = (
        side / DPI - min(1.0, side / DPI / 16) for side in pixels
    )  # inches; Graphviz shrinks what is larger, and adds a margin
    settings = [f"dpi={DPI}", f"size={width:.3f},{height:.3f}"] if name == "png" else []
    commands = []
    if sys.executable and importlib.util.find_spec("pygraphviz") is not None:
        commands.append([sys.executable, "-c", _CHILD, name, *settings])
    if (executable := shutil.which("dot")) is not None:
        commands.append([executable, f"-T{name}", *(f"-G{setting}" for setting in settings)])
    if not commands:
        _warn_once(
            "Pictures of the layer graph can't be drawn: neither pygraphviz nor a Graphviz `dot` program is installed. Write "
            "`pip install 'pygraphviz>=2'` (its wheels carry Graphviz). Until then only the .dot file is written."
        )
    if len(text) >= _too_large.get(name, sys.maxsize):
        return None
    fonts = find_fonts() if commands else Fonts()
    if not fonts.found:
        _warn_once(
            "No font is installed, so the PNG pictures have boxes for letters. Install one, such as fonts-dejavu-core, or matplotlib."
        )
    source = text.translate(fonts.missing if name == "png" else {}).encode()
    environment = {**os.environ, **fonts.environment}
    for command in commands:
        try:
            done = subprocess.run(command, input=source, capture_output=True, timeout=timeout, env=environment, check=False)
        except subprocess.TimeoutExpired:
            _too_large[name] = len(text) * 9 // 10
            _warn_once(
                f"Graphviz needed more than {timeout:g} s for a {name} of the layer graph and was stopped; the .dot file has it whole."
            )
            return None
        except OSError as error:
            problem = str(error)
        else:
            if done.returncode == 0 and done.stdout:
                return done.stdout
            problem = done.stderr.decode(errors="replace").strip().rpartition("\n")[2] or f"exit status {done.returncode}"
        if command is commands[-1]:
            _warn_once(f"Graphviz could not draw a {name} of the layer graph ({problem}); the .dot file has it.")
    return None


def _write(path: Path, data: bytes) -> bool:
    try:
        write_file(path, data)
    except (OSError, ValueError) as error:
        _warn_once(
            f"Pictures in '{path.parent}' can't be written ({getattr(error, 'strerror', None) or error}); choose another output_dir."
        )
        return False
    return True


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, CCOWarning, stacklevel=4)
