"""Weights that only custom operators, products of complex numbers or functions without a row in the table read stay in float, which is said once."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_cco import CCOWarning, quantize


@torch.library.custom_op("cco_tests::product", mutates_args=())
def product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


@torch.library.custom_op("cco_tests::two_products", mutates_args=())
def two_products(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.relu(x @ first.t()) @ second.t()


class Child(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.cco_tests.product(x, self.weight)


class Reading(nn.Module):
    def __init__(self, form: Callable[[Reading, Tensor], Tensor]) -> None:
        super().__init__()
        self.form, self.child = form, Child()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.weight, self.other, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
        self.complex, self.pairs = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64)), nn.Parameter(torch.randn(8, 8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(self.form(self, torch.relu(self.first(x))))))


NAMED: dict[str, tuple[Callable[[Reading, Tensor], Tensor], tuple[str, ...], str]] = {
    "custom": (lambda s, h: product(h, s.weight), ("weight",), "cco_tests_product"),
    "two weights": (lambda s, h: two_products(h, s.weight, s.child.weight), ("weight", "child.weight"), "cco_tests_two_products"),
    "in a child": (lambda s, h: s.child(h), ("child.weight",), "in module 'child'"),
    "called twice": (lambda s, h: s.child(s.child(h)), ("child.weight",), "in module 'child'"),
    "overload": (lambda s, h: torch.ops.cco_tests.product.default(h, s.weight), ("weight",), "cco_tests_product"),
    "complex weight": (lambda s, h: (h.to(torch.complex64) @ s.complex).abs(), ("complex",), "matmul of complex numbers"),
    "pairs": (lambda s, h: (h.to(torch.complex64) @ torch.view_as_complex(s.pairs)).real, ("pairs",), "matmul of complex numbers"),
    "complex linear": (
        lambda s, h: nn.functional.linear(torch.complex(h, h), torch.complex(s.weight, s.other)).abs(),
        ("weight", "other"),
        "linear of complex numbers",
    ),
    "distances": (lambda s, h: torch.exp(-torch.cdist(h, s.weight)), ("weight",), "(cdist, in the model itself)"),
    "distances of a unit": (lambda s, h: torch.cdist(h, nn.functional.normalize(s.weight)), ("weight",), "(cdist,"),
    "cosines": (lambda s, h: nn.functional.cosine_similarity(h[:, None], s.weight[None], dim=2), ("weight",), "cosine_similarity"),
    "tensordot": (lambda s, h: torch.tensordot(h, s.weight, ([1], [1])), ("weight",), "tensordot"),
    "rows by vectors": (lambda s, h: torch.stack([torch.mv(s.weight, row) for row in h]), ("weight",), "mv"),
    "experts": (
        lambda s, h: (s.pairs.transpose(1, 2)[h[:, 0].gt(0).long()] @ h[:, :8, None]).mean(1) + h,
        ("pairs",),
        "matrices chosen by indices",
    ),
}


@pytest.mark.parametrize("form", NAMED)
def test_weights_of_what_has_no_int8_kernel_are_named_once(form: str) -> None:
    function, names, what = NAMED[form]
    with pytest.warns(CCOWarning, match="stay in float") as caught:
        quantize(Reading(function).eval(), None, (torch.randn(4, 8),))
    (said,) = [str(warning.message) for warning in caught]
    assert ", ".join(map(repr, names)) in said
    assert what in said
    assert said.count(repr(names[0])) == 1


SILENT: dict[str, Callable[[Reading, Tensor], Tensor]] = {
    "aten mm": lambda s, h: torch.ops.aten.mm(h, s.weight),
    "aten linear": lambda s, h: torch.ops.aten.linear(h, s.weight, s.bias),
    "aten addmm": lambda s, h: torch.ops.aten.addmm.default(s.bias, h, s.weight),
    "a bias alone": lambda s, h: product(h, torch.diag(s.bias)),
    "read by a layer, too": lambda s, h: product(h, s.second.weight),
    "a token in the place of others": lambda s, h: torch.where(h > 0, h, s.bias[None]),
    "a table": lambda s, h: h + s.weight[h[:, 0].gt(0).long()],
    "a map beside": lambda s, h: (h - s.weight[0]) * s.other[:4],
    "a loss of its own": lambda s, h: h + 0 * torch.cdist(s.weight, s.other).mean(),
    "spectrum": lambda s, h: torch.fft.irfft(torch.fft.rfft(h), n=8) + s.bias,
}


@pytest.mark.parametrize("form", SILENT)
def test_nothing_is_said_of_weights_that_are_quantized(form: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CCOWarning)
        quantize(Reading(SILENT[form]).eval(), None, (torch.randn(4, 8),))
