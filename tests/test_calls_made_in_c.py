"""Torch calls that functions of C make: the interpreter names their place otherwise once the code has run often, and they are the same layers still."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import quantize

OFTEN = 40  # how often code has to run for Python 3.11 to specialize it, and more

FORMS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "sum of a list": lambda t: sum(t),
    "sum from a tensor": lambda t: sum(t[1:], start=t[0]),
    "sum of a generator": lambda t: sum(2 * x for x in t),
    "operator.mul": lambda t: operator.add(operator.mul(t[0], t[1]), t[2]),
    "abs and pow": lambda t: operator.add(abs(t[0]), pow(t[1], 2)),
    "map": lambda t: next(map(operator.add, t[:1], t[1:2])),
}


class Branches(nn.Module):
    def __init__(self, form: Callable[[list[Tensor]], Tensor]) -> None:
        super().__init__()
        self.branches, self.last, self.form = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 8), form

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.form([branch(x) for branch in self.branches])))


@pytest.mark.parametrize("form", FORMS)
def test_code_that_runs_often_is_quantized_as_before(form: str) -> None:
    model, x = Branches(FORMS[form]), torch.randn(4, 8)
    quantized = quantize(model, {"global_quantization_settings": {"skip_tail_quantization": False}}, (x,))
    quantized.calibrate([x])
    first = model(x)
    for _ in range(OFTEN):
        last = model(x)
    assert not quantized.drift
    assert torch.equal(first, last)


@pytest.mark.parametrize("form", FORMS)
def test_code_that_has_run_often_before_the_capture(form: str) -> None:
    model, x = Branches(FORMS[form]), torch.randn(4, 8)
    for _ in range(OFTEN):
        model(x)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    for _ in range(OFTEN):
        model(x)
    assert not quantized.drift
