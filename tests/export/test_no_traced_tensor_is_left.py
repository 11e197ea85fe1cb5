"""What a user's code keeps of a forward is, after an export, what it was: no tensor of a trace is left there, and none is in the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_cco as cc

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own
KEPT: dict[str, Tensor] = {}


class Keeping(nn.Module):
    """Keeps an activation in an attribute, another one under a global name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        self.last, KEPT["h"] = h.detach(), h.detach()
        return self.head(torch.relu(self.second(h)))


@pytest.mark.parametrize("name", ["model.pt2", "model.onnx"])
def test_nothing_of_a_trace_is_left(name: str, tmp_path: Path) -> None:
    model, x, kept = Keeping().eval(), torch.randn(4, 6), dict[str, Any]()
    model.first.register_forward_hook(lambda module, args, output: kept.update(x=args[0], out=output.detach()))
    quantized = cc.quantize(model, None, (x,))
    quantized.calibrate([x])
    wanted = model(x).detach()
    before = {"last": model.last, "h": KEPT["h"], **kept}
    quantized.export(tmp_path / name)
    after = {"last": model.last, "h": KEPT["h"], **kept}
    assert {key: type(value) for key, value in after.items()} == dict.fromkeys(before, Tensor)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("kind", ["fake", "wrapped"])
def test_a_tensor_without_values_is_in_nobodys_way(kind: str) -> None:
    """As a hook leaves one that ran inside of somebody else's trace or transform."""
    model, x = Keeping().eval(), torch.randn(4, 6)
    quantized = cc.quantize(model, None, (x,))
    if kind == "fake":
        program = torch.export.export(nn.Linear(6, 2), (x,), dynamic_shapes={"input": {0: torch.export.Dim("n")}})
        KEPT["h"] = next(node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.meta["val"].dim() == 2)
        KEPT["x"] = next(node.meta["val"] for node in program.graph.nodes if node.op == "call_function")
    else:
        torch.func.vmap(lambda row: KEPT.update(h=row, x=row * 2) or row)(x)
    quantized.calibrate([x])
    assert quantized.sensitivity([x]).local
    KEPT.clear()
