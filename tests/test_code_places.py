"""Compilers copy code, and the interpreter runs it in several ways: a call is the same layer wherever it stands then, and two calls are two layers.

The reference is a network whose code can't be copied, or that runs as it was captured.
"""

from __future__ import annotations

import dis
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import QuantizedModel, quantize
from lightning_cco.errors import CCOWarning
from lightning_cco.graph import code_places

EVERYTHING = {"global_quantization_settings": {"skip_tail_quantization": False}}


@pytest.fixture(params=["columns", "lines alone"], autouse=True)
def _known_of_the_text(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Python 3.10, and a newer one with ``-X no_debug_ranges``, do not know columns."""
    instructions = dis.get_instructions

    def without_columns(code: Any) -> list[Any]:
        return [
            one._replace(positions=one.positions._replace(col_offset=None)) if hasattr(one, "positions") else one
            for one in instructions(code)
        ]

    def forget() -> None:
        code_places._by_identity.clear()
        code_places._by_code.clear()

    forget()
    if request.param == "lines alone":
        monkeypatch.setattr(dis, "get_instructions", without_columns)
    yield
    forget()


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last, self.noise = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4), nn.Dropout(0.0)
        self.branch = False

    def body(self, x: Tensor, y: Tensor) -> Tensor:
        z = x + y
        return z * 2.0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.last(self.body(x, self.second(x)))


class InAnExpression(Network):
    def body(self, x: Tensor, y: Tensor) -> Tensor:
        return 2.0 * self.total(x, y)

    def total(self, x: Tensor, y: Tensor) -> Tensor:
        return x + (self.noise(y) if self.training else y)


class AfterStatements(InAnExpression):
    def total(self, x: Tensor, y: Tensor) -> Tensor:
        if self.training:
            y = self.noise(y)
        else:
            y = y[:]
        return x + y


class AfterBranchesByData(InAnExpression):
    def total(self, x: Tensor, y: Tensor) -> Tensor:
        if self.branch:
            y = self.noise(y)
        else:
            y = y[:]
        return x + y


class InAComprehension(InAnExpression):
    def total(self, x: Tensor, y: Tensor) -> Tensor:
        if self.training:
            y = self.noise(y)
        else:
            y = y[:]
        return sum([x, y])


def _trained(network: type[Network]) -> tuple[QuantizedModel, list[Tensor], dict[str, tuple[float, float]]]:
    torch.manual_seed(0)
    model, x = network(), torch.randn(16, 8)
    quantized = quantize(model, EVERYTHING, (x,))
    quantized.calibrate([x])
    model.train()
    outputs = []
    for step in range(6):
        model.branch = step > 2
        outputs.append(model(x * (1 + step)))
        outputs[-1].square().sum().backward()
        quantized.update_ranges()
    return quantized, outputs, {str(key): (float(one.min_val), float(one.max_val)) for key, one in quantized.activations.items()}


@pytest.mark.parametrize("network", [InAnExpression, AfterStatements, AfterBranchesByData, InAComprehension])
def test_an_end_that_two_branches_lead_to_is_one_layer(network: type[Network]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own, outputs, ranges = _trained(network)
    _, expected, expected_ranges = _trained(Network)
    assert not own.drift
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
    assert [*ranges.values()] == [*expected_ranges.values()]


class OneOfTwoFunctions(Network):
    def body(self, x: Tensor, y: Tensor) -> Tensor:
        return self.some(x + y) if self.branch else self.other(x + y)

    def some(self, x: Tensor) -> Tensor:
        return torch.relu(x)

    def other(self, x: Tensor) -> Tensor:
        return torch.relu(x)


class OneOfTwoComprehensions(Network):
    def body(self, x: Tensor, y: Tensor) -> Tensor:
        if self.branch:
            return sum([torch.relu(x) for x in [x + y]])
        return sum([torch.relu(x) for x in [x + y]])


class OneOfTwoComprehensionsInALine(Network):
    def body(self, x: Tensor, y: Tensor) -> Tensor:
        return sum([torch.relu(x) for x in [x + y]]) if self.branch else sum([torch.relu(x) for x in [x + y]])  # noqa: RUF034


class OneOfTwoGenerators(Network):
    def body(self, x: Tensor, y: Tensor) -> Tensor:
        return next(torch.relu(x) for x in [x + y]) if self.branch else next(torch.relu(x) for x in [x + y])  # noqa: RUF034


@pytest.mark.parametrize("network", [OneOfTwoFunctions, OneOfTwoComprehensions, OneOfTwoComprehensionsInALine, OneOfTwoGenerators])
def test_another_branch_is_said_though_it_looks_alike(network: type[Network], request: pytest.FixtureRequest) -> None:
    in_a_line = network in (OneOfTwoComprehensionsInALine, OneOfTwoGenerators)
    if in_a_line and (sys.version_info < (3, 11) or "lines alone" in request.node.callspec.id):
        pytest.skip("two ends in one line are told apart by their columns")
    model, x = network().eval(), torch.randn(16, 8)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    model(x)
    assert not quantized.drift
    model.branch = True
    with pytest.warns(CCOWarning, match=r"another call of 'relu' came instead"):
        model(x)


class OfFunctions(Network):
    def body(self, x: Tensor, y: Tensor) -> Tensor:
        for _ in range(2):
            y = F.hardtanh(F.relu(y) - F.relu(input=x))
        return y


def test_functions_of_python_are_where_they_were_while_a_compiler_watches() -> None:
    model, x = OfFunctions().eval(), torch.randn(16, 8)
    quantized = quantize(model, EVERYTHING, (x,))
    quantized.calibrate([x])
    expected = model(x)
    try:
        compiled = torch.compile(model, backend="eager", dynamic=False)
        compiled(x[:2])
        torch.compiler.set_stance("eager_on_recompile")  # runs as it is, and may use what was compiled
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)
    finally:
        torch.compiler.set_stance("default")
        torch._dynamo.reset()
    assert not quantized.drift
