"""Random modules: hooking changes no bit while quantization is off, and every planned tensor lies on its grid while it is on."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from linear_inputs import LinearInputs
from matrix_values import round_nothing, same_tensors
from torch import Tensor, nn

from lightning_cco import QuantizedModel, quantize
from lightning_cco.quantization.tensor_key import TensorKey

VARIABLES = ["a", "b", "c"]
NEW = [
    "{0} = self.linears[{k}]({1})",
    "{0} = self.block({1})",
    "{0} = self.relu({1})",
    "{0} = {1} + {2}",
    "{0} = {1} - 0.5 * {2}",
    "{0} = F.relu({1})",
    "{0} = torch.tanh({1})",
    "{0} = torch.sin({1})",
    "{0} = torch.cat([{1}, {2}], dim=1)[:, 2:6]",
    "{0} = self.functional({1})",
]
IN_PLACE = [
    "{0}.add_({1})",
    "{0} *= 0.5",
    "F.relu_({0})",
    "{0}.clamp_(-2.0, 1.0)",
    "{0}[:, 0] = 0.25",
    "{0}[:, 1:3] += {1}[:, 1:3]",
    "{0}.sin_()",
]
ONLY_ELEMENTWISE = [statement for statement in NEW if "self." not in statement]


class Block(nn.Module):
    """A submodule with two layers; it is called several times."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.fc(x))) + x


class Generated(nn.Module):
    """What generated forwards have at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.block, self.relu, self.weight = Block(), nn.ReLU(inplace=True), nn.Parameter(torch.randn(4, 4))
        self.head = nn.Linear(4, 2)

    def functional(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@st.composite
def statements(draw: st.DrawFn, kinds: list[str], most: int) -> list[str]:
    found = []
    for template in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=most)):
        names = [draw(st.sampled_from(VARIABLES)) for _ in range(3)]
        found.append(template.format(*names, k=draw(st.integers(0, 2))))
    return found


@st.composite
def forwards(draw: st.DrawFn) -> str:
    """The source of a forward, so that each call has a place of its own in the code."""
    lines = ["a = self.linears[0](x)", "b = self.linears[1](x)", "c = a + b"]
    for kind in draw(st.lists(st.sampled_from(["plain", "loop", "training", "training in loop"]), min_size=1, max_size=4)):
        body = draw(statements(NEW + IN_PLACE, 3))
        branch = ["if self.training:", *(f"    {line}" for line in draw(statements(ONLY_ELEMENTWISE + IN_PLACE, 2)))]
        if kind == "plain":
            lines += body
        elif kind == "training":
            lines += [*branch, *body]
        else:
            inside = body if kind == "loop" else [*branch, *body]
            lines += ["for _ in range(2):", *(f"    {line}" for line in inside)]
    # Bounded on the way to the head, so that what was added up often does not blow up.
    return "\n    ".join(["def forward(self, x):", *lines, "return self.head(torch.tanh(a + b + c))"])


def built(source: str) -> tuple[nn.Module, Tensor]:
    namespace: dict[str, Any] = {"torch": torch, "F": F, "__name__": "generated"}
    exec(compile(source, "generated.py", "exec"), namespace)
    torch.manual_seed(0)
    return type("Model", (Generated,), {"forward": namespace["forward"]})(), torch.randn(6, 4)


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and the buffers that the forward moved."""
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        found = [model(x), *(buffer.clone() for buffer in model.buffers())]
    model.load_state_dict(state)
    return found


def hooked(model: nn.Module, x: Tensor) -> QuantizedModel:
    quantized = quantize(model, None, (x,))
    quantized.calibrate([(x,)])
    return quantized


def trains(model: nn.Module, x: Tensor) -> bool:
    """Whether autograd takes the forward: writing over what it keeps it refuses."""
    try:
        model(x).square().sum().backward()
    except RuntimeError as error:
        assert "inplace" in str(error)  # noqa: PT017
        return False
    return all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


PROPERTY = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@PROPERTY
@given(forwards())
def test_hooks_alone_change_no_bit(source: str) -> None:
    model, x = built(source)
    expected = {training: outputs(model.train(training), x) for training in (False, True)}
    quantized = hooked(model, x)
    for training in (False, True):
        with quantized.disabled():
            assert same_tensors(outputs(model.train(training), x), expected[training])
    quantized.remove()
    for training in (False, True):
        assert same_tensors(outputs(model.train(training), x), expected[training])


@PROPERTY
@given(forwards())
def test_quantizers_that_round_nothing_change_nothing(source: str) -> None:
    """In-place operations, clamps that a quantizer takes over and shared submodules included."""
    model, x = built(source)
    expected = {training: outputs(model.train(training), x) for training in (False, True)}
    hooked(model, x)
    with pytest.MonkeyPatch.context() as patch:
        round_nothing(patch)
        for training in (False, True):
            assert same_tensors(outputs(model.train(training), x), expected[training], exact=False)


@PROPERTY
@given(forwards())
def test_every_planned_tensor_is_on_its_grid(source: str) -> None:
    model, x = built(source)
    plain = copy.deepcopy(model)
    quantized = hooked(model, x)
    calls: Counter[str] = Counter()
    for key, quantizer in quantized.activations.items():
        quantizer.register_forward_hook(lambda *_, key=key: calls.update([key]))
    graph = quantized.graph
    # Where a tensor is made; the input at each reader; what is read beside the network (by code whose result nobody uses) at those of its readers in INT8.
    exactly = {
        key: max(1, len(graph.successors(key))) if key == "input_0" else 1 for key in quantized.activations if not graph[key].read_out
    }
    at_readers = {key: len(graph.successors(key)) for key in quantized.activations if graph[key].read_out}

    with LinearInputs() as inputs, torch.no_grad():
        model.eval()(x)
    assert {key: calls[key] for key in exactly} == exactly
    assert all(1 <= calls[key] <= most for key, most in at_readers.items())
    linears = [name for name in quantized.graph.names if quantized.graph[name].kind == "linear"]
    assert len(inputs.found) == len(linears)
    for name, value in zip(linears, inputs.found, strict=True):
        origin = quantized.plan.origins[TensorKey(quantized.graph.predecessors(name)[0])].layer
        if name in quantized.plan.quantized:
            quantizer = quantized.activations[origin]
            levels = value.double() / quantizer.scale.double() + quantizer.zero_point
            assert torch.allclose(levels, levels.round(), rtol=0, atol=1e-3), f"{name} reads {origin}"
            assert levels.min() > -0.5
            assert levels.max() < 255.5

    calls.clear()
    model.train()
    assert trains(model, x) or not trains(plain.train(), x)
    assert {key: calls[key] for key in exactly} == exactly
    assert all(1 <= calls[key] <= most for key, most in at_readers.items())
    assert quantized.drift == []
