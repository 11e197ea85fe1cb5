"""What the first forward makes and keeps for the others: a constant if no input goes into it, a value otherwise."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import quantize
from lightning_cco.errors import CCOWarning

Make = Callable[["Lazy"], Tensor]


def _attribute(net: Lazy) -> Tensor:
    if net.kept is None:
        net.kept = net.make(net)
    return net.kept


def _new_attribute(net: Lazy) -> Tensor:
    if not hasattr(net, "late"):
        net.late = net.make(net)
    return net.late


def _buffer(net: Lazy) -> Tensor:
    if net.buffer is None:
        net.buffer = net.make(net)
    return net.buffer


def _dictionary(net: Lazy) -> Tensor:
    if 16 not in net.by_length:
        net.by_length[16] = net.make(net)
    return net.by_length[16]


def _list(net: Lazy) -> Tensor:
    if net.rows[1] is None:
        net.rows[1] = net.make(net)
    return net.rows[1]


def _object(net: Lazy) -> Tensor:
    if net.store.kept is None:
        net.store.kept = net.make(net)
    return net.store.kept


class Store:
    kept: Tensor | None

    def __init__(self) -> None:
        self.kept = None


class Lazy(nn.Module):
    """A product with something that is made once."""

    late: Tensor

    def __init__(self, make: Make, keep: Make | None) -> None:
        super().__init__()
        self.make, self.keep = make, keep
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.v, self.g = (
            nn.Parameter(torch.randn(16, 16) / 4, requires_grad=False),
            nn.Parameter(torch.rand(16, 1) + 0.5, requires_grad=False),
        )
        self.kept: Tensor | None = None
        self.register_buffer("buffer", None)
        self.by_length: dict[int, Tensor] = {}
        self.rows: list[Tensor | None] = [None, None]
        self.store = Store()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        weight = self.make(self) if self.keep is None else self.keep(self)
        return self.last(torch.relu(F.linear(x, weight)) * 1.5)


PLACES: dict[str, Make] = {
    "attribute": _attribute,
    "new attribute": _new_attribute,
    "buffer": _buffer,
    "dictionary": _dictionary,
    "list": _list,
    "object": _object,
}

MAKES: dict[str, Make] = {
    "weight norm": lambda net: net.v * net.g,
    "weight standardization": lambda net: (net.v - net.v.mean(1, keepdim=True)) / net.v.std(1, keepdim=True) / 4,
    "detached": lambda net: (net.v * net.g).detach(),
    "table": lambda net: torch.cos(torch.outer(torch.arange(16.0), torch.arange(16.0)) * 0.2) / 4,
}


def _quantized_output(make: Make, keep: Make | None) -> tuple[Tensor, set[str]]:
    torch.manual_seed(0)
    model, x = Lazy(make, keep).eval(), torch.randn(32, 8)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    assert quantized.graph["linear_1"].parameters == NAMES[make]
    assert not [layer for layer in quantized.graph if layer.kind in ("unseen", "written")]
    with torch.no_grad():
        found = model(x)
    assert quantized.drift == []
    return found, set(quantized.weights)


NAMES: dict[Make, tuple[str, ...]] = {
    MAKES["weight norm"]: ("v", "g"),
    MAKES["detached"]: ("v", "g"),
    MAKES["weight standardization"]: ("v",),
    MAKES["table"]: (),
}


@pytest.mark.parametrize(("how", "place"), [*(("weight norm", place) for place in PLACES), *((how, "attribute") for how in MAKES)])
def test_what_is_kept_is_rounded_as_what_is_made_each_time(how: str, place: str) -> None:
    wanted, weights = _quantized_output(MAKES[how], None)
    found, same = _quantized_output(MAKES[how], PLACES[place])
    assert "linear_1" in weights
    assert same == weights
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_random_numbers_that_are_kept_are_a_constant_and_those_drawn_anew_are_not() -> None:
    kept = quantize(Lazy(lambda net: torch.randn(16, 16) / 4, _attribute), None, (torch.randn(32, 8),))
    assert "linear_1" in kept.weights
    anew = quantize(Lazy(lambda net: torch.randn(16, 16) / 4, None), None, (torch.randn(32, 8),))
    assert "linear_1" not in anew.weights


class Recurrent(nn.Module):
    """Goes on from its own last result, which begins with zeros that the first forward makes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.state: Tensor | None = None
        self.calls: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls = torch.zeros(()) if self.calls is None else self.calls + 1
        if self.state is None:
            self.state = x.new_zeros(len(x), 16)
        self.state = torch.tanh(self.first(x) + self.again(self.state)).detach()
        return self.last(self.state * self.calls)


def test_states_and_counters_are_values() -> None:
    quantized = quantize(Recurrent(), None, (torch.randn(32, 8),))
    assert "linear_1" in quantized.weights
    read = {name for name in quantized.graph.names for name in quantized.graph.predecessors(name)}
    assert sum(name.startswith("unseen") for name in read) == 2


class Cached(nn.Module):
    def __init__(self, fresh_in_training: bool, reset: bool = False) -> None:
        super().__init__()
        self.fresh, self.reset = fresh_in_training, reset
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.v, self.g = nn.Parameter(torch.randn(16, 16) / 4), nn.Parameter(torch.rand(16, 1) + 0.5)
        self.kept: Tensor | None = None

    def train(self, mode: bool = True) -> Cached:
        if self.reset:
            self.kept = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None or (self.fresh and self.training):
            self.kept = self.v * self.g
        return self.last(torch.relu(F.linear(torch.relu(self.first(x)), self.kept)))


def test_a_kept_weight_that_training_does_not_reach_is_named() -> None:
    with pytest.warns(CCOWarning, match=r"Cached: its forward made 'kept' of 'v'.*'g' in its first call.*does not reach it"):
        quantize(Cached(fresh_in_training=False), None, (torch.randn(32, 8),))


@pytest.mark.parametrize(("fresh", "reset"), [(True, False), (True, True), (False, True)])
def test_a_kept_weight_that_training_makes_anew_is_trained_without_a_word(fresh: bool, reset: bool) -> None:
    torch.manual_seed(0)
    model, x = Cached(fresh, reset), torch.randn(32, 8)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x).square().mean().backward()
    assert model.v.grad is not None
    assert model.v.grad.abs().sum() > 0
    assert "linear_1" in quantized.weights


def test_a_parameter_that_the_first_forward_makes_is_captured_and_said() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
            self.late: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            if self.late is None:
                self.late = nn.Parameter(torch.eye(x.shape[-1]))
            return self.last(torch.relu(F.linear(x, self.late)))

    with pytest.warns(CCOWarning, match="its forward makes modules with parameters: 'late'.*optimizer"):
        quantized = quantize(Late(), None, (torch.randn(16, 8),))
    assert quantized.graph["linear_1"].parameters == ("late",)
    assert "linear_1" in quantized.weights


class Rotary(nn.Module):
    """Keeps cosine and sine of each length that it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[int, tuple[Tensor, Tensor]] = {}
        self.queries, self.keys, self.values, self.last = (nn.Linear(8, 8) for _ in range(4))

    def turned(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if length not in self.tables:
            angles = torch.outer(torch.arange(float(length)), 1 / 100 ** (torch.arange(0.0, 8, 2) / 8))
            self.tables[length] = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        cosine, sine = self.tables[length]
        return x * cosine + torch.cat([-x[..., 4:], x[..., :4]], -1) * sine

    def forward(self, x: Tensor) -> Tensor:
        scores = self.turned(self.queries(x)) @ self.turned(self.keys(x)).transpose(1, 2)
        return self.last(torch.softmax(scores, -1) @ self.values(x))


def test_a_file_holds_tables_that_are_made_when_they_are_needed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Rotary().eval(), torch.randn(4, 6, 8)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    assert not [layer for layer in quantized.graph if layer.kind == "unseen"]
    assert quantized.export(tmp_path / "rotary.onnx", dynamic_sizes=False).sqnr_db > 35
    longer = torch.randn(4, 9, 8)
    with torch.no_grad():  # the first call makes tables for that length
        assert torch.equal(model(longer), model(longer))
    assert quantized.drift == []
