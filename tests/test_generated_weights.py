"""Weights that a forward makes: rounded where they are made of parameters, said where they are drawn, planned as activations where layers make them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import quantize
from lightning_cco.errors import CCOWarning

Inner = Callable[[nn.Module, Tensor], Tensor]


class Net(nn.Module):
    """Between two layers of its own something is computed with the parameters of `spare`, which is never called."""

    def __init__(self, inner: Inner) -> None:
        super().__init__()
        self.inner = inner
        self.first, self.spare, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.inner(self.spare, torch.relu(self.first(x))))
        return self.last(torch.relu(self.second(x)))


def _loaded(spare: nn.Module, x: Tensor) -> Tensor:
    made = nn.Linear(16, 16)
    made.load_state_dict(spare.state_dict())
    return made(x)


def _assigned(spare: nn.Module, x: Tensor) -> Tensor:
    made = nn.Linear(16, 16, device="meta")
    made.load_state_dict(spare.state_dict(), assign=True)
    return made(x)


def _copied(spare: nn.Module, x: Tensor) -> Tensor:
    made = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    made[0].weight.data.copy_(spare.weight)
    made[0].bias.data.copy_(spare.bias.data)
    return made(x)


def _of_copies(spare: nn.Module, x: Tensor) -> Tensor:
    made = nn.Linear(16, 16)
    made.weight, made.bias = nn.Parameter(spare.weight.detach().clone()), nn.Parameter(spare.bias.detach().clone())
    return made(x)


def _convolution(spare: nn.Module, x: Tensor) -> Tensor:
    made = nn.Conv1d(16, 16, 1)
    made.weight.data, made.bias.data = spare.weight.data[:, :, None], spare.bias.data
    return made(x[:, :, None])[:, :, 0]


MADE: dict[str, Inner] = {
    "load_state_dict": _loaded,
    "load_state_dict(assign=True)": _assigned,
    ".data.copy_": _copied,
    "nn.Parameter(copy)": _of_copies,
    "deepcopy": lambda spare, x: copy.deepcopy(spare)(x),
    "another form": _convolution,
    "functional_call": lambda spare, x: torch.func.functional_call(spare, {"weight": spare.weight * 0.5, "bias": spare.bias}, (x,)),
}


@pytest.mark.parametrize("how", MADE)
def test_weights_made_of_parameters_are_those_parameters(how: str) -> None:
    torch.manual_seed(0)
    model, x = Net(MADE[how]).eval(), torch.randn(16, 8)
    with torch.no_grad():
        reference = model(x)
        quantized = quantize(model, None, (x,))
        quantized.calibrate([x])
        layer = next(one for one in quantized.graph if "spare.weight" in one.parameters and one.kind in ("linear", "conv"))
        assert layer.name in quantized.plan.in_int8
        assert not [one for one in quantized.graph if one.kind in ("unseen", "written", "copy")]
        rounded = model(x)
        assert 0 < float((rounded - reference).norm() / reference.norm()) < 0.03
        site = quantized.capture.sites[layer.name]
        assert [weight.slot for weight in site.weights] == [(1,)]


def test_stacked_modules_have_their_names() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.skeleton, self.last = [nn.Linear(8, 8, device="meta")], nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            parameters, buffers = torch.func.stack_module_state(self.heads)  # type: ignore[arg-type]
            call = torch.vmap(lambda p, b, x: torch.func.functional_call(self.skeleton[0], (p, b), (x,)), in_dims=(0, 0, None))
            return self.last(torch.relu(call(parameters, buffers, x).mean(0)))

    torch.manual_seed(0)
    model, x = Stacked(), torch.randn(16, 8)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    linear = quantized.graph["linear"]
    assert {"heads.0.weight", "heads.1.weight", "heads.2.weight"} <= set(linear.parameters)
    assert quantized.plan.decisions["linear"].weights_num_bits == 8
    assert "linear" in quantized.weights


@pytest.mark.parametrize("kind", ["linear", "embedding", "lstm"])
def test_weights_drawn_in_each_forward_stay_in_float_with_a_word(kind: str) -> None:
    class Drawn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            if kind == "linear":
                x = x + nn.Linear(8, 8)(x)
            elif kind == "embedding":
                x = x + nn.Embedding(5, 8)(torch.arange(5))[:1]
            else:
                x = nn.LSTM(8, 8, batch_first=True)(x[:, None])[0][:, 0]
            return self.last(torch.relu(self.second(x)))

    torch.manual_seed(0)
    model, x = Drawn(), torch.randn(16, 8)
    with pytest.warns(CCOWarning, match=r"Drawn: the forward of 'the model itself' makes modules or parameters, and draws .*__init__"):
        quantized = quantize(model, None, (x,))
    drawn = next(layer for layer in quantized.graph if layer.kind == kind and not layer.parameters) if kind != "embedding" else None
    if drawn is not None:
        assert drawn.name not in quantized.plan.quantized | quantized.plan.weight_only
        assert "draws the weights" in quantized.plan.skipped[drawn.name]


def test_a_module_that_the_first_forward_makes_is_captured_and_said() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
            self.late: nn.Module | None = None

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            if self.late is None:
                self.late = nn.Linear(8, 8)
            return self.last(torch.relu(self.late(x)))

    torch.manual_seed(0)
    model, x = Late(), torch.randn(16, 8)
    with pytest.warns(CCOWarning, match="its forward makes modules with parameters: 'late'.*optimizer"):
        quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    made = model.late
    model(x).sum().backward()
    assert model.late is made
    assert quantized.graph["linear_1"].path == "late"
    assert quantized.plan.decisions["linear_1"].weights_num_bits == 8
    assert quantized.drift == []


class Hyper(nn.Module):
    """One layer makes weight or bias of another."""

    def __init__(self, made_weight: bool, made_bias: bool) -> None:
        super().__init__()
        self.made_weight, self.made_bias = made_weight, made_bias
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)
        if made_weight:
            self.weights = nn.Linear(8, 256)
        if made_bias:
            self.biases = nn.Linear(8, 16)
        self.weight, self.bias = nn.Parameter(torch.randn(16, 16) / 4), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(0, keepdim=True)
        weight = self.weights(mean).view(16, 16) if self.made_weight else self.weight
        bias = self.biases(mean)[0] if self.made_bias else self.bias
        return self.last(torch.relu(self.second(torch.relu(F.linear(torch.relu(self.first(x)), weight, bias)))))


@pytest.mark.parametrize("target", ["ort", "openvino"])
@pytest.mark.parametrize(("made_weight", "made_bias"), [(True, False), (True, True), (False, True)])
def test_made_weights_are_planned_as_what_they_are(made_weight: bool, made_bias: bool, target: str) -> None:
    torch.manual_seed(0)
    model, x = Hyper(made_weight, made_bias).eval(), torch.randn(16, 8)
    quantized = quantize(model, {"deployment_settings": {"target_framework": target}}, (x,))
    quantized.calibrate([x])
    layer = next(one for one in quantized.graph if one.attributes.get("made_weight") or one.attributes.get("made_bias"))
    decision = quantized.plan.decisions[layer.name]
    assert layer.weighted is not made_weight
    assert (decision.weights_num_bits is None) is made_weight
    assert set(quantized.weights) == {name for name, one in quantized.plan.decisions.items() if one.weights_num_bits is not None}
    assert decision.quantized is (made_weight and not made_bias and target == "ort")
    if made_bias:  # it is added in float
        assert not [key for key in quantized.activations if key == "linear_1" and made_weight]


def test_a_file_computes_with_made_weights_biases_and_tables(tmp_path: Path) -> None:
    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.weights, self.biases = nn.Linear(8, 80), nn.Linear(8, 64), nn.Linear(8, 8)
            self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            mean = x.mean(0, keepdim=True)
            x = F.embedding(ids, torch.relu(self.rows(mean)).view(10, 8))
            x = torch.relu(F.linear(x, self.weights(mean).view(8, 8)))
            return self.last(torch.relu(F.linear(x, self.second.weight, self.biases(mean)[0])))

    torch.manual_seed(0)
    model, given = Made().eval(), (torch.randn(6, 8), torch.randint(0, 10, (6,)))
    quantized = quantize(model, None, given)
    quantized.calibrate([given])
    assert quantized.plan.decisions["embedding"].weights_num_bits is None
    report = quantized.export(tmp_path / "model.onnx")
    assert report.sqnr_db > 40
    assert not [island for island in report.float_islands if island.unplanned]
