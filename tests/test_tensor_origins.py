"""Values reach a layer in ways that a function mode does not see at once: the layer is quantized all the same."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import quantize
from lightning_cco.graph.capture import capture, capture_graph

Fill = Callable[[Tensor], Tensor]


class Reads(nn.Module):
    """Two linear layers that read what a function has made of the input."""

    def __init__(self, fill: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.fill = fill
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Any) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(self.fill(x))))))


def copied_into_slices(x: Tensor) -> Tensor:
    out = x.new_zeros(len(x), 6)
    for i, row in enumerate(x):
        out[i, :4].copy_(row)
    return out


def copied_into_rows_of_an_iteration(x: Tensor) -> Tensor:
    out = torch.zeros(len(x), 6)
    for row, padded in zip(x, out, strict=True):
        padded[:4].copy_(row)
    return out


def assigned_to_a_view(x: Tensor) -> Tensor:
    out = torch.zeros(len(x), 6)
    for i in range(len(x)):
        out[i][:4] = x[i]
    return out


def added_to_a_view(x: Tensor) -> Tensor:
    out = torch.zeros(len(x), 6)
    out[:, :4].add_(x)
    return out


def added_to_a_flat_view(x: Tensor) -> Tensor:
    out = torch.zeros(len(x), 4)
    flat = out.view(-1)
    flat += x.flatten()
    return F.pad(out, (0, 2))


def read_through_an_older_view(x: Tensor) -> Tensor:
    out = torch.zeros(len(x), 6)
    view = out[:]
    out.index_copy_(1, torch.arange(4), x)
    return view


def given_as_out(x: Tensor) -> Tensor:
    out = torch.empty(len(x), 6)
    torch.cat([x, x[:, :2]], 1, out=out)
    return out


def put_in_data(x: Tensor) -> Tensor:
    out = torch.zeros(len(x), 6)
    out.data = F.pad(x, (0, 2))
    return out


def set_to(x: Tensor) -> Tensor:
    return torch.zeros(1).set_(F.pad(x, (0, 2)))


@torch.jit.script
def _scripted(x: Tensor) -> Tensor:
    return torch.cat([x * torch.sigmoid(x), x[:, :2]], 1)


def scripted(x: Tensor) -> Tensor:
    return _scripted(x)


def through_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(F.pad(x, (0, 2)).numpy() * 2.0)


def through_a_list(x: Tensor) -> Tensor:
    return torch.tensor(F.pad(x, (0, 2)).tolist())


def drawn(x: Tensor) -> Tensor:
    return torch.randn(len(x), 6)


def drawn_in_place(x: Tensor) -> Tensor:
    return x.new_empty(len(x), 6).uniform_()


def mapped(x: Tensor) -> Tensor:
    return torch.vmap(lambda row: F.pad(row * 2.0, (0, 2)))(x)


@torch.library.custom_op("lightning_cco_tests::pad_into", mutates_args=("out",))
def _pad_into(x: Tensor, out: Tensor) -> None:
    out[:, :4] = x


def written_by_a_custom_operator(x: Tensor) -> Tensor:
    out = torch.zeros(len(x), 6)
    torch.ops.lightning_cco_tests.pad_into(x, out)
    return out


FILLS = [
    copied_into_slices,
    copied_into_rows_of_an_iteration,
    assigned_to_a_view,
    added_to_a_view,
    added_to_a_flat_view,
    read_through_an_older_view,
    given_as_out,
    put_in_data,
    set_to,
    scripted,
    through_numpy,
    through_a_list,
    drawn,
    drawn_in_place,
    written_by_a_custom_operator,
]


@pytest.mark.parametrize("fill", FILLS)
def test_what_reads_values_from_anywhere_is_captured_and_quantized(fill: Fill) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    model = Reads(fill).eval()
    torch.manual_seed(1)
    expected = model(x).detach()
    quantized = quantize(model, None, (x,))
    torch.manual_seed(1)
    quantized.calibrate([(x,)])
    assert [layer.kind for layer in quantized.graph if layer.weighted] == ["linear"] * 3
    assert {"linear", "linear_1"} <= set(quantized.plan.quantized)
    read = {"linear"}
    while read and not read & set(quantized.activations) - {"linear"}:  # the layer's input is rounded, too
        read = {before for name in read for before in quantized.graph.predecessors(name)}
    assert read
    assert quantized.graph.outputs
    torch.manual_seed(1)
    found = model(x).detach()
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < 0.05
    assert quantized.drift == []


def test_what_a_mapped_function_reads_is_known() -> None:
    graph = capture_graph(Reads(mapped), torch.randn(5, 4))
    assert graph.ancestors("linear") >= {"input_0", "mul"}


@pytest.mark.parametrize("fill", [copied_into_slices, assigned_to_a_view, added_to_a_view])
def test_gradients_reach_the_input_through_the_views(fill: Fill) -> None:
    x = torch.randn(5, 4)
    model = Reads(fill)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([(x,)])
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.abs().sum() > 0)


def test_parts_of_one_memory_that_do_not_overlap_stay_apart() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.left, self.right = nn.Linear(4, 8), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.first(x).chunk(2, -1)
            a.sigmoid_()
            return self.left(a) + self.right(b)

    graph = capture_graph(Halves(), torch.randn(5, 4))
    assert not [layer for layer in graph if layer.kind == "written"]
    assert graph.predecessors("linear_2") == ("chunk",)


def test_constants_stay_constants() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.Embedding(8, 4), nn.Linear(4, 4)
            self.register_buffer("window", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            scaled = torch.zeros(8, 4)
            scaled[:, :] = self.table.weight * self.window
            return self.fc(x + scaled[: len(x)])

    graph = capture_graph(Positions(), torch.randn(5, 4))
    assert graph.names == ("input_0", "add", "linear", "output_0")
    assert graph["add"].parameters == ("table.weight",)


def test_capturing_replaces_nothing_in_pytorch() -> None:
    before = vars(torch.autograd.Function)["apply"]

    def look(x: Tensor) -> Tensor:
        assert vars(torch.autograd.Function)["apply"] is before
        return F.pad(x, (0, 2))

    capture_graph(Reads(look), torch.randn(5, 4))


class Record:
    """A batch like those of graph libraries: what it holds is in a store of its own."""

    def __init__(self, **values: Tensor) -> None:
        self._store = collections.UserDict(values)

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._store[name]


class Slotted:
    __slots__ = ("__x",)

    def __init__(self, x: Tensor) -> None:
        self.__x = x

    @property
    def x(self) -> Tensor:
        return self.__x


@dataclasses.dataclass
class Sample:
    x: Tensor
    name: str = "a"


Pair = collections.namedtuple("Pair", "x y")

OBJECTS = {
    "record": lambda x: Record(x=x, y=x),
    "slots": Slotted,
    "dataclass": Sample,
    "namedtuple": lambda x: Pair(x, x),
    "namespace": lambda x: SimpleNamespace(x=x, y={"z": x}),
    "nested": lambda x: SimpleNamespace(x=x, more=[Sample(x + 1), SimpleNamespace(y=x + 2)]),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_tensors_are_found_in_whatever_the_model_is_given(kind: str) -> None:
    x = torch.randn(5, 4)
    model = Reads(lambda batch: F.pad(batch.x, (0, 2)))
    quantized = quantize(model, None, (OBJECTS[kind](x),))
    quantized.calibrate([(OBJECTS[kind](x),)])
    assert "input_0" in quantized.plan.quantized
    assert quantized.graph.predecessors("pad") == ("input_0",)
    assert str(quantized.graph["input_0"].attributes["argument"]).endswith("x")


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_weights_of_recurrent_layers_are_its_operands(kind: str, packed: bool, options: dict[str, Any]) -> None:
    rnn = getattr(nn, kind)(4, 6, batch_first=True, **options)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = rnn

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            whole = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False) if packed else x
            return self.rnn(whole)[1]

    x, lengths = torch.randn(3, 5, 4), torch.tensor([5, 2, 3])
    model = Net()
    captured = capture(model, lambda: model(x, lengths))
    site = next(site for site in captured.sites.values() if site.op.kind == kind.lower())
    found = [name for weight in site.weights for name in weight.parameters]
    assert found == [f"rnn.{name}" for name, p in rnn.named_parameters() if p.dim() == 2]
