"""What runs where no function mode can see it is named in a warning, and what runs out of the blue is drift."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import quantize
from lightning_cco.errors import CCOError, CCOWarning


@torch.jit.script
def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.t() + bias


class ScriptedFunction(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return _affine(x, self.weight, self.bias)


class NumPy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return torch.from_numpy(x.detach().numpy() @ self.weight.detach().numpy().T)


class Opaque(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, weight: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return x @ weight.t()


HIDDEN: dict[str, Callable[[], nn.Module]] = {
    "scripted function": lambda: ScriptedFunction(4, 4),
    "NumPy": lambda: NumPy(4, 4),
    "custom function": lambda: Opaque(4, 4),
    "scripted module": lambda: torch.jit.script(nn.Linear(4, 4)),
    "traced module": lambda: torch.jit.trace(nn.Linear(4, 4), torch.ones(1, 4)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", HIDDEN)
def test_a_module_that_runs_unseen_is_named(kind: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), HIDDEN[kind](), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 4)
    with pytest.warns(CCOWarning, match="not in the layer graph, so they stay in float: '2'"):
        quantized = quantize(model, None, (x,))
    assert {"linear", "linear_1"} <= set(quantized.plan.quantized)
    assert quantized.graph["linear_1"].path == "3"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_model_that_runs_unseen_as_a_whole_is_an_error_that_says_so() -> None:
    with pytest.raises(CCOError, match=r"no layer was captured.*TorchScript"):
        quantize(nn.Sequential(torch.jit.script(nn.Linear(4, 4))), None, (torch.randn(5, 4),))


class Sometimes(nn.Module):
    """Does one thing more from some time on."""

    def __init__(self, more: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.more, self.now = nn.Linear(4, 4), nn.Linear(4, 4), more, False

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        return self.second(self.more(y) if self.now else y)


MORE: dict[str, Callable[[Tensor], Tensor]] = {
    "div": lambda y: y / 2.0,
    "stack": lambda y: torch.stack([y, y])[0],
    "mean": lambda y: y - torch.mean(y, 1, keepdim=True),
    "interpolate": lambda y: F.interpolate(y[:, None], size=4)[:, 0],
    "adaptive_avg_pool": lambda y: F.adaptive_avg_pool1d(y, 4),
    "sigmoid": lambda y: torch.sigmoid(y),
}


@pytest.mark.parametrize("kind", MORE)
def test_whatever_the_engine_runs_in_int8_is_drift_when_it_runs_unseen(kind: str) -> None:
    model, x = Sometimes(MORE[kind]), torch.randn(5, 4)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([(x,)])
    model(x)
    assert quantized.drift == []
    model.now = True
    with pytest.warns(CCOWarning, match="though never"):
        model(x)
    assert any(f"'{kind}'" in message for message in quantized.drift)
