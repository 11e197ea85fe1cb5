"""Operators that take functions (`torch.cond`, `scan`): what these call runs in float with a word, is trained as in the float model, and exported."""

from __future__ import annotations

import copy
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

from lightning_cco import quantize
from lightning_cco.errors import CCOWarning


class Chooses(nn.Module):
    """One of two layers, by `torch.cond`, which traces both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.other, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.last(torch.cond(x.sum() > 0, lambda x: torch.relu(self.one(x)), lambda x: torch.relu(self.other(x)), (x,)))


class Repeats(nn.Module):
    """A layer for each step of a sequence, by `scan`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.last = nn.Linear(8, 8), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        def step(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.tanh(self.one(torch.cat([state, x], 1))), x * 1.0

        x = torch.relu(self.first(x)).unsqueeze(0).repeat(3, 1, 1)
        return self.last(scan(step, torch.zeros_like(x[0]), x)[0])


class Loops(nn.Module):
    """A layer applied until something holds, by `while_loop`; the body runs where the inputs are negative on average."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        again = (x.sum() < 0).repeat(1)
        step, hidden = torch.tensor(0), torch.relu(self.first(x))
        state = (step, hidden, again)
        return self.last(while_loop(lambda i, x, b: (i < 3) & b.all(), lambda i, x, b: (i + 1, self.one(x).tanh(), b.clone()), state)[1])


class ChoosesTwice(nn.Module):
    """A choice within a choice, between convolutions, inside of another module, one weight of which belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 3)
        self.inner = nn.Module()
        self.inner.one, self.inner.other = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))

        def one(x: Tensor) -> Tensor:
            return torch.cond(x.mean() > 100, lambda x: torch.relu(self.inner.one(x)), lambda x: x * 2.0, (x,))

        def other(x: Tensor) -> Tensor:
            return torch.relu(self.inner.other(x)) + (x.mean((2, 3)) @ self.weight)[:, :, None, None]

        x = torch.relu(self.last(torch.cond(x.mean() > 0.2, one, other, (x,))))
        return self.head(x.mean((2, 3)))


_INSIDE = {
    Chooses: ("cond", "one.weight, other.weight"),
    Repeats: ("scan", "one.weight"),
    Loops: ("while_loop", "one.weight"),
    ChoosesTwice: ("cond", "inner.one.weight, inner.other.weight, weight"),
}


def _example(model: nn.Module) -> Tensor:
    return torch.randn(4, 3, 8, 8) if isinstance(model, ChoosesTwice) else torch.randn(6, 8)


@pytest.mark.parametrize("shift", [-5.0, 5.0], ids=["one way", "the other"])
@pytest.mark.parametrize("model_class", _INSIDE)
def test_weights_of_all_branches_are_named(model_class: type[nn.Module], shift: float) -> None:
    torch.manual_seed(0)
    model = model_class()
    kind, weights = _INSIDE[model_class]
    with pytest.warns(CCOWarning, match=rf"\({kind} runs functions whose calls hooks don't see.*it reads ") as given:
        quantized = quantize(model, None, (_example(model) + shift,))
    said = [str(warning.message) for warning in given if "it reads" in str(warning.message)]
    assert len(said) == 1
    assert sorted(said[0].partition("it reads ")[2].partition(")")[0].split(", ")) == weights.split(", ")
    edges = [(edge.source, edge.destination) for edge in quantized.graph.edges]
    assert any(destination == kind for _, destination in edges)
    assert any(source == kind for source, _ in edges)
    assert kind not in quantized.plan.quantized


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*runs functions whose calls hooks", "ignore::FutureWarning")
@pytest.mark.parametrize("ending", ["onnx", "pt2", "pt2 with operators"])
@pytest.mark.parametrize("model_class", _INSIDE)
def test_files_hold_all_branches(model_class: type[nn.Module], ending: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = model_class().eval()
    x = _example(model)
    operators = {"deployment_settings": {"target_framework": "executorch"}} if ending.endswith("operators") else None
    quantized = quantize(model, operators, (x,))
    quantized.calibrate([x - 1, x + 1])
    path = tmp_path / f"a.{ending.split()[0]}"
    quantized.export(path, (x,))
    for given in (x, x - 1, x + 1, 1 - x):
        with torch.no_grad():
            wanted = model(given)
        if ending == "onnx":
            found = torch.from_numpy(onnxruntime.InferenceSession(path).run(None, {"x": given.numpy()})[0])
        else:
            found = torch.export.load(path).module()(given).detach()
        assert float((found - wanted).abs().max()) < 0.02 * float(wanted.abs().max())


# The compiler looks at the gradients of its inputs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.slow
@pytest.mark.parametrize("model_class", [Chooses, Repeats])
def test_bodies_of_control_flow_run_in_float(model_class: type[nn.Module]) -> None:
    torch._dynamo.reset()
    model, x = model_class(), torch.randn(6, 8)
    plain = copy.deepcopy(model)
    with pytest.warns(CCOWarning, match=r"it reads one\.weight"):
        quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    assert {"linear"} <= quantized.plan.quantized
    found, expected = model(x), plain(x)
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()
    found.square().mean().backward()
    expected.square().mean().backward()
    for (name, parameter), reference in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (parameter.grad is None) == (reference.grad is None), name
        if parameter.grad is not None:
            assert (parameter.grad - reference.grad).norm() <= 0.1 * reference.grad.norm(), name
    assert quantized.drift == []
    torch._dynamo.reset()
