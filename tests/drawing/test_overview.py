"""The overview: every layer in one box, few boxes, a picture that fits a screen."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from pathlib import Path

import networkx as nx
import pygraphviz
import pytest
import torch
from models import GuideCNN, ResidualCNN
from PIL import Image
from tensorboard.compat.proto.graph_pb2 import GraphDef
from torch import Tensor, nn

from lightning_cco import QuantizedModel, quantize
from lightning_cco.drawing.modules_view import modules_view
from lightning_cco.drawing.node_label import GREEN, WHITE, YELLOW, mixed
from lightning_cco.drawing.overview import HEIGHT, WIDTH, draw_overview, share_in_int8
from lightning_cco.drawing.overview_layout import laid_out
from lightning_cco.drawing.render import DPI, save_overview
from lightning_cco.monitoring.graph_def import graph_def


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Odd(nn.Module):
    """Many branches of unlike sizes, several outputs."""

    def __init__(self, branches: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(4, 4 + number) for number in range(branches))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [branch(x) for branch in self.branches]


NETS = {
    "guide": lambda: (GuideCNN(), GuideCNN.example()),
    "residual": lambda: (ResidualCNN(), torch.randn(2, 1, 16, 16)),
    "deep": lambda: (nn.Sequential(nn.Linear(4, 8), *(Block(8, 16) for _ in range(40)), nn.Linear(8, 2)), torch.randn(2, 4)),
    "all unlike": lambda: (nn.Sequential(nn.Linear(4, 8), *(Block(8, 9 + n) for n in range(40)), nn.Linear(8, 2)), torch.randn(2, 4)),
    "odd": lambda: (Odd(30), torch.randn(2, 4)),
}


def quantized(net: str) -> QuantizedModel:
    model, x = NETS[net]()
    return quantize(model.eval(), {"global_quantization_settings": {"skip_tail_quantization": False}}, (x,))


@pytest.mark.parametrize("most", [6, 11, 30])
@pytest.mark.parametrize("net", NETS)
def test_every_layer_is_in_one_box(net: str, most: int) -> None:
    graph = quantized(net).graph
    boxes, edges = modules_view(graph, lambda layer: None, most)
    assert sorted(name for box in boxes for name in box.members) == sorted(graph.names)
    assert len(boxes) <= most
    home = {name: number for number, box in enumerate(boxes) for name in box.members}
    reference = nx.quotient_graph(
        nx.DiGraph([(edge.source, edge.destination) for edge in graph.edges]), lambda a, b: home[a] == home[b], create_using=nx.DiGraph
    )
    between = {(home[next(iter(a))], home[next(iter(b))]) for a, b in reference.edges}
    assert set(edges) == between


def test_repeated_blocks_are_one_box_and_opened_together() -> None:
    model = quantized("deep")
    labels = {box.label: box.repeats for box in modules_view(model.graph, lambda layer: None, 5)[0]}
    assert labels == {"input_0": 1, "0": 1, "[1-40]": 40, "41": 1, "output_0": 1}
    labels = {box.label: box.repeats for box in modules_view(model.graph, lambda layer: None, 11)[0]}
    assert labels == {"input_0": 1, "0": 1, "[1-40].norm": 40, "[1-40].up": 40, "[1-40].down": 40, "41": 1, "output_0": 1}


def test_blocks_that_are_decided_otherwise_are_not_one() -> None:
    model = quantized("deep")
    odd = next(layer.name for layer in model.graph if layer.path == "7.up" and layer.kind == "linear")
    labels = [box.label for box in modules_view(model.graph, lambda layer: layer.name == odd, 8)[0]]
    assert labels == ["input_0", "0", "[1-6]", "7", "[8-40]", "41", "output_0"]


def test_stages_stay_apart_and_small_neighbours_are_put_together() -> None:
    """As in a ResNet: stem and head are single layers, the stages hold all others."""
    stages = {
        f"layer{n}": nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(n)))
        for n in range(1, 5)
    }
    stem = {"conv1": nn.Conv2d(3, 4, 3), "bn1": nn.BatchNorm2d(4), "relu": nn.ReLU(), "maxpool": nn.MaxPool2d(2)}
    head = {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "drop": nn.Dropout(), "fc": nn.Linear(4, 2)}
    model = quantize(nn.Sequential(OrderedDict(stem | stages | head)).eval(), "w8a8", (torch.randn(2, 3, 16, 16),))
    labels = [box.label for box in modules_view(model.graph, lambda layer: None, 9)[0]]
    assert labels == ["input_0", "conv1 … maxpool", *stages, "avgpool … flatten", "fc", "output_0"]


def test_long_names_make_fewer_boxes_that_can_be_read(tmp_path: Path) -> None:
    names = [f"block_with_quite_a_long_name_{n}" for n in range(12)]
    model = quantize(nn.Sequential(OrderedDict((name, nn.Linear(4, 4)) for name in names)).eval(), "w8a8", (torch.randn(2, 4),))
    dot = draw_overview(model.graph, model.plan, {}, "")
    natural = float(re.findall(r'width="(\d+)pt"', pygraphviz.AGraph(string=dot.to_string()).draw(format="svg", prog="dot").decode())[0])
    shrunk = WIDTH / DPI * 72 / natural
    assert shrunk > 0.6


@pytest.mark.parametrize("net", NETS)
def test_it_fits_a_screen(net: str, tmp_path: Path) -> None:
    model = quantized(net)
    written = save_overview(model.graph, tmp_path / "overview", model.plan, dict.fromkeys(model.graph.names, 3.0), "epoch 3")
    with Image.open(written["png"]) as picture:
        assert picture.width <= WIDTH
        assert picture.height <= HEIGHT
    assert "largest Quantization Sensitivity" in written["svg"].read_text()


def stages(blocks: tuple[int, ...], *, nested: bool) -> nn.Module:
    """A stem, blocks of a convolution each, and a head; the blocks in a module for each stage, or all in one."""

    def block(channels: int, width: int) -> nn.Module:
        return nn.Sequential(OrderedDict(conv=nn.Conv2d(channels, width, 3, padding=1), bn=nn.BatchNorm2d(width), relu=nn.ReLU()))

    parts: list[nn.Module] = []
    channels = 4
    for stage, depth in enumerate(blocks):
        made = [block(channels if not number else 4 * 2**stage, 4 * 2**stage) for number in range(depth)]
        channels = 4 * 2**stage
        parts += [nn.Sequential(OrderedDict(layers=nn.Sequential(*made)))] if nested else made
    body = {"encoder": nn.Sequential(OrderedDict(stages=nn.Sequential(*parts)))}
    ends = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "classifier": nn.Linear(channels, 2)}
    return nn.Sequential(OrderedDict({"embedder": nn.Conv2d(3, 4, 3), **body, **ends}))


@pytest.mark.parametrize("nested", [True, False])
def test_no_box_holds_all_stages(nested: bool, tmp_path: Path) -> None:
    """As in the ResNet-50 of transformers, where a stage is a module, and in nets that have all blocks in one module."""
    model = quantize(stages((3, 4, 6, 3), nested=nested).eval(), "w8a8", (torch.randn(1, 3, 16, 16),))
    layout = laid_out(model.graph, lambda layer: model.plan.decisions[layer.name].quantized, lambda box, letters: 8.6 * len(box.label) + 22)
    largest = max(len(box.members) for box in layout.boxes)
    assert largest <= 0.5 * len(model.graph)
    labels = [box.label for box in layout.boxes]
    expected = range(4) if nested else ("[0-2]", "[3-6]", "[7-12]", "[13-15]")
    assert [label for label in labels if "stages" in label] == [f"encoder.stages.{each}" for each in expected]
    with Image.open(save_overview(model.graph, tmp_path / "overview", model.plan)["png"]) as picture:
        assert picture.width <= WIDTH
        assert picture.height <= HEIGHT


def test_siblings_are_opened_together() -> None:
    blocks = [nn.Sequential(OrderedDict(norm=nn.LayerNorm(8), up=nn.Linear(8, 9 + n), down=nn.Linear(9 + n, 8))) for n in range(3)]
    model = quantize(nn.Sequential(OrderedDict(stages=nn.Sequential(*blocks), head=nn.Linear(8, 2))).eval(), "w8a8", (torch.randn(2, 8),))
    labels = [box.label for box in modules_view(model.graph, lambda layer: None, 8)[0]]
    assert labels == ["input_0", "stages.0", "stages.1", "stages.2", "head", "output_0"]
    assert len(modules_view(model.graph, lambda layer: None, 12)[0]) == 3 + 9


def test_norms_do_not_count() -> None:
    """What the box of a module says is what the summary says: of multiplications, not of layers."""
    model = quantize(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)).eval(), "w8a8", (torch.randn(2, 4),))
    assert "layer_norm" in model.plan.skipped
    dot = draw_overview(model.graph, model.plan).to_string()
    box = next(line for line in dot.split("];") if "<B>1</B>" in line)
    assert WHITE.fill in box
    assert "%" not in box


def test_the_share_is_that_of_the_multiplications() -> None:
    model = quantized("guide")
    model.replan(suggestions=["conv_1"])
    graph, plan = model.graph, model.plan
    work = {name: graph[name].multiplications for name in ("conv", "conv_1")}
    assert share_in_int8(graph, plan, ["conv", "conv_1"]) == work["conv"] / sum(work.values())
    assert math.isnan(share_in_int8(graph, plan, ["relu", "max_pool"]))


def test_colours_follow_the_share() -> None:
    assert mixed(0.0) == YELLOW
    assert mixed(1.0) == GREEN
    redness = [int(mixed(share).fill[1:3], 16) for share in (0.0, 0.25, 0.5, 0.75, 0.995, 1.0)]
    assert redness == sorted(redness, reverse=True)
    assert redness[-2] - redness[-1] <= 1  # nearly all looks like all


def test_nearly_all_is_not_all(tmp_path: Path) -> None:
    """The tail of 40 multiplications is in float: the picture says of it what the log does."""
    x = torch.randn(1, 1, 32, 32)
    pooled = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    )
    model = quantize(pooled.eval(), "w8a8", (x,))
    assert 0.999 < model.plan.share_of_multiplications < 1
    svg = save_overview(model.graph, tmp_path / "overview", model.plan, {}, "")["svg"].read_text()
    assert "over 99 % of the multiplications" in model.plan.summary
    assert model.plan.summary in svg


def test_tensorboard_opens_on_modules_not_on_one_box() -> None:
    """A closed box for each name before the first slash: those that are seen at once."""
    network = stages((3, 4, 12, 3), nested=True)
    model = quantize(nn.Sequential(OrderedDict(net=network)).eval(), "w8a8", (torch.randn(1, 3, 16, 16),))
    nodes = GraphDef.FromString(graph_def(model.plan, {})).node
    assert {node.name.split("/")[0] for node in nodes} == {
        "input_0", "embedder", "stages.0", "stages.1", "stages.2", "stages.3", "pool", "flatten", "classifier", "output_0",
    }  # fmt: skip
    modules = {node.name.split("/")[-1]: node.attr["module"].s.decode() for node in nodes}
    assert modules == {layer.name: layer.path for layer in model.graph}
