"""Transforms inside a forward, weights made on the way, writes of every kind: each module with parameters is captured with its weights, or named."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.masked import masked_tensor

from lightning_cco import quantize
from lightning_cco.errors import CCOError

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
WHOLE = {"global_quantization_settings": {"skip_tail_quantization": False}}


class Three(nn.Module):
    """Three linear layers, put together by a function."""

    def __init__(self, between: Callable[[Three, Any], Tensor], **more: Any) -> None:
        super().__init__()
        self.a, self.b, self.c, self.between = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4), between
        for name, module in more.items():
            setattr(self, name, module)

    def forward(self, x: Any) -> Tensor:
        return self.c(F.relu(self.between(self, x)))


def _vmap(m: Three, x: Tensor) -> Tensor:
    return torch.vmap(lambda row: m.b(F.relu(m.a(row))))(x)


def _jvp(m: Three, x: Tensor) -> Tensor:
    return torch.func.jvp(lambda t: m.b(F.relu(m.a(t))), (x,), (torch.ones_like(x),))[0]


def _functional(m: Three, x: Tensor) -> Tensor:
    return torch.func.functional_call(m.b, {name: p * 1.0 for name, p in m.b.named_parameters()}, (F.relu(m.a(x)),))


def _made_weights(m: Three, x: Tensor) -> Tensor:
    return F.linear(F.relu(m.b(F.relu(m.a(x)))), m.hyper(m.code).view(8, 8))


def _index_put(m: Three, x: Tensor) -> Tensor:
    out = torch.zeros(16, 8)
    out.index_put_((torch.arange(16),), F.relu(m.a(x)))
    return m.b(out)


def _scatter(m: Three, x: Tensor) -> Tensor:
    return m.b(torch.zeros(16, 8).scatter_(0, torch.arange(16)[:, None].expand(16, 8), F.relu(m.a(x))))


def _data(m: Three, x: Tensor) -> Tensor:
    out = torch.zeros(16, 8)
    out.data.copy_(F.relu(m.a(x)))
    return m.b(out)


def _numpy(m: Three, x: Tensor) -> Tensor:
    return m.b(torch.from_numpy(F.relu(m.a(x)).detach().numpy() * 2))


def _copied(m: Three, x: Tensor) -> Tensor:
    return copy.deepcopy(m.b)(F.relu(m.a(x)))


def _mask(m: Three, x: Tensor) -> Tensor:
    return torch.where(torch.tensor([[i % 2 == 0 for i in range(8)]]), m.a(x), m.b(x))


class Row(NamedTuple):
    x: Tensor
    name: str


class Stream:
    def __iter__(self) -> Iterator[Tensor]:
        yield X


CASES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "vmap": (lambda: Three(_vmap), X),
    "jvp": (lambda: Three(_jvp), X),
    "functional_call": (lambda: Three(_functional), X),
    "weights made by a network": (lambda: Three(_made_weights, hyper=nn.Linear(4, 64), code=nn.Parameter(torch.randn(4))), X),
    "index_put_": (lambda: Three(_index_put), X),
    "scatter_": (lambda: Three(_scatter), X),
    "data": (lambda: Three(_data), X),
    "numpy": (lambda: Three(_numpy), X),
    "deepcopy": (lambda: Three(_copied), X),
    "mask of Python": (lambda: Three(_mask), X),
    "named tuple": (lambda: Three(lambda m, row: m.b(F.relu(m.a(row.x)))), Row(X, "a")),
    "iterable": (lambda: Three(lambda m, stream: m.b(F.relu(m.a(next(iter(stream)))))), Stream()),
}


@pytest.mark.parametrize("case", CASES)
def test_every_module_is_captured_and_rounded(case: str) -> None:
    torch.manual_seed(0)
    build, example = CASES[case]
    model = build().eval()
    quantized = quantize(model, WHOLE, (example,))
    assert sum(layer.weighted for layer in quantized.graph) == sum(isinstance(module, nn.Linear) for module in model.modules())
    quantized.calibrate([example], lambda module, batch: module(batch))
    with torch.no_grad(), quantized.disabled():
        exact = model(example)
    with torch.no_grad():
        rounded = model(example)
    assert 25 < 10 * torch.log10(exact.var() / (exact - rounded).square().mean()) < 70
    assert quantized.drift == []


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_lazy_modules_are_named() -> None:
    with pytest.raises(CCOError, match=r"\['0.weight', '0.bias'\] of lazy modules have no shape yet"):
        quantize(nn.Sequential(nn.LazyLinear(4)), None, (X,))


@pytest.mark.filterwarnings("ignore:.*(nested|prototype|MaskedTensor).*:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_refused_by_name(layout: torch.layout) -> None:
    rows = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=layout)
    with pytest.raises(CCOError, match="the model itself: its 'forward' reads a nested tensor"):
        quantize(nn.Sequential(nn.Linear(8, 4)), None, (rows,))


class Masks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + masked_tensor(x, x > 0).mean(1, keepdim=True).to_tensor(0.0))


@pytest.mark.filterwarnings("ignore:.*(nested|prototype|MaskedTensor).*:UserWarning")
def test_masked_tensors_are_refused_by_name() -> None:
    with pytest.raises(CCOError, match=r"the model itself: its 'mean' reads a MaskedTensor.*torch\.where"):
        quantize(Masks(), None, (torch.randn(4, 8),))
    x = torch.randn(4, 8)
    with pytest.raises(CCOError, match="its 'forward' reads a MaskedTensor"):
        quantize(nn.Sequential(nn.Linear(8, 4)), None, (masked_tensor(x, x > 0),))
