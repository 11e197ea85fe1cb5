"""Models with several outputs: each branch walks up to its own first weighted layer, whatever the outputs come in."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import capture_graph, plan_quantization
from lightning_cco.quantization.plan import QuantizationPlan


@dataclass
class Boxes:
    scores: Tensor
    boxes: Tensor
    level: int = 2


Pair = namedtuple("Pair", ["scores", "boxes"])


class Detector(nn.Module):
    """Two levels of features, on each a convolution for scores and one for boxes, reshaped and joined over the levels."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.pack = pack
        self.stem, self.deeper = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.scores, self.boxes = (nn.ModuleList(nn.Conv2d(8, 4, 1) for _ in range(2)) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        fine = F.relu(self.stem(x))
        levels = (fine, F.relu(self.deeper(fine)))
        scores = [head(level).permute(0, 2, 3, 1).reshape(len(x), -1, 4) for head, level in zip(self.scores, levels, strict=True)]
        boxes = [head(level).permute(0, 2, 3, 1).reshape(len(x), -1, 4) for head, level in zip(self.boxes, levels, strict=True)]
        return self.pack(torch.cat(scores, 1).sigmoid(), torch.cat(boxes, 1))


class AuxiliaryUNet(nn.Module):
    """A U-Net whose middle gives a prediction of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.up, self.join = nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(8, 4, 3, padding=1)
        self.main, self.auxiliary = nn.Conv2d(4, 2, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = F.relu(self.down1(x))
        second = F.relu(self.down2(F.max_pool2d(first, 2)))
        auxiliary = F.interpolate(self.auxiliary(second), scale_factor=2.0).sigmoid()
        joined = F.relu(self.join(torch.cat([self.up(second), first], 1)))
        return {"main": self.main(joined).sigmoid(), "auxiliary": auxiliary}


def tail_modules(plan: QuantizationPlan) -> tuple[set[str], set[str]]:
    """Modules of the weighted layers in the tail, and kinds of the others there."""
    tail = [plan.graph[name] for name, reason in plan.skipped.items() if reason.startswith("tail")]
    return {layer.path for layer in tail if layer.weighted}, {layer.kind for layer in tail if not layer.weighted}


@pytest.mark.parametrize(
    ("pack", "keys"),
    [
        pytest.param(lambda scores, boxes: (scores, boxes), ["0", "1"], id="tuple"),
        pytest.param(lambda scores, boxes: [scores, (boxes,)], ["0", "1.0"], id="nested"),
        pytest.param(lambda scores, boxes: {"scores": scores, "boxes": boxes}, ["scores", "boxes"], id="dict"),
        pytest.param(Boxes, ["scores", "boxes"], id="dataclass"),
        pytest.param(Pair, ["scores", "boxes"], id="namedtuple"),
        pytest.param(
            lambda scores, boxes: {"detections": Boxes(scores, boxes)}, ["detections.scores", "detections.boxes"], id="dataclass_in_dict"
        ),
    ],
)
def test_detection_heads(pack: Callable[[Tensor, Tensor], Any], keys: list[str]) -> None:
    graph = capture_graph(Detector(pack), torch.randn(2, 3, 16, 16))
    assert [graph[name].attributes["key"] for name in graph.outputs] == keys
    plan = plan_quantization(graph)
    weighted, others = tail_modules(plan)
    assert weighted == {"scores.0", "scores.1", "boxes.0", "boxes.1"}
    assert others == {"permute", "reshape", "concat", "sigmoid"}
    assert {graph[name].path for name in plan.quantized if graph[name].weighted} == {"stem", "deeper"}


def test_a_u_net_with_an_auxiliary_output() -> None:
    plan = plan_quantization(capture_graph(AuxiliaryUNet(), torch.randn(2, 1, 8, 8)))
    assert tail_modules(plan) == ({"main", "auxiliary"}, {"interpolate", "sigmoid"})
    assert {plan.graph[name].path for name in plan.quantized if plan.graph[name].weighted} == {"down1", "down2", "join"}
    assert {plan.graph[name].path for name in plan.weight_only} == {"up"}


class Encoder(nn.Module):
    """Gives its features in some form, and what its head makes of some of them."""

    def __init__(self, form: Callable[[Tensor], Tensor], read: Callable[[Tensor], Tensor] = lambda x: x, named: bool = False) -> None:
        super().__init__()
        self.body, self.head, self.form, self.read, self.named = nn.Linear(4, 4), nn.Linear(4, 2), form, read, named

    def forward(self, x: Tensor) -> dict[str, Tensor] | tuple[Tensor, Tensor]:
        features = F.relu(self.body(x))
        given, logits = self.form(features), self.head(self.read(features))
        return {"features": given, "logits": logits} if self.named else (given, logits)


def moved_often(x: Tensor) -> Tensor:
    for _ in range(600):
        x = x.reshape(-1, 2).reshape(2, 6, 4)
    return x


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(Encoder(lambda x: x, named=True), id="as they are"),
        pytest.param(Encoder(lambda x: x.permute(0, 2, 1)), id="moved"),
        pytest.param(Encoder(lambda x: x[:, -2:].transpose(1, 2).flatten(1)), id="last steps"),
        pytest.param(Encoder(lambda x: torch.zeros(2, 6, 4).copy_(x)), id="copied"),
        pytest.param(Encoder(lambda x: x.chunk(2, -1)[0]), id="half"),
        pytest.param(Encoder(moved_often), id="moved very often"),
        pytest.param(Encoder(lambda x: x, lambda x: x[:, 0]), id="the head reads the first"),
    ],
)
def test_features_returned_beside_the_logits_end_nothing(model: Encoder) -> None:
    assert tail_modules(plan_quantization(capture_graph(model, torch.randn(2, 6, 4)))) == ({"head"}, set())


@pytest.mark.parametrize(
    "repeated",
    [
        pytest.param(lambda x: x[:, :, None].expand(-1, -1, 2, -1).flatten(1, 2), id="expanded"),
        pytest.param(lambda x: x.repeat_interleave(2, 1), id="repeat_interleave"),
        pytest.param(lambda x: x.repeat(1, 2, 1), id="repeated"),
        pytest.param(lambda x: F.pad(x, (0, 0, 3, 3)), id="padded"),
        pytest.param(lambda x: F.interpolate(x.transpose(1, 2), scale_factor=2.0).transpose(1, 2), id="nearest"),
    ],
)
def test_the_last_steps_of_features_that_are_read_repeated_end_nothing(repeated: Callable[[Tensor], Tensor]) -> None:
    class Attention(nn.Module):
        """Gives the last of its keys to a cache, as layers with a sliding window do, and reads all of them for several heads."""

        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            keys = torch.tanh(self.key(x))
            read = repeated(keys)
            return keys[:, -3:], self.head(F.scaled_dot_product_attention(self.query(x), read, read))

    assert tail_modules(plan_quantization(capture_graph(Attention(), torch.randn(2, 6, 4)))) == ({"head"}, set())


def test_another_part_of_a_tensor_is_a_result_of_its_own() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            both = self.body(F.relu(self.stem(x)))
            return both[..., :4].permute(0, 2, 1), self.head(both[..., 4:])

    weighted, _ = tail_modules(plan_quantization(capture_graph(Halves(), torch.randn(2, 6, 4))))
    assert weighted == {"body", "head"}
