"""Modules in which nothing is rounded run without the function mode; what is around them is rounded as ever, whatever happens inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_cco import CCOWarning, QuantizedModel, quantize
from lightning_cco.compat.torch_modes import function_mode_count


class Scale(nn.Module):
    """Computes in float, and does on the way what a test wants."""

    def __init__(self) -> None:
        super().__init__()
        self.act: Callable[[], Any] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        self.act()
        return torch.special.erf(torch.sin(x))


Scale.__module__ = "torch.nn.modules.activation"  # as if it were PyTorch's own: other modules may call something else the next time


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale, self.last = nn.Linear(4, 8), Scale(), nn.Linear(8, 8)
        self.caught: list[BaseException] = []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = side = torch.relu(self.first(x))
        try:
            side = self.scale(x)
        except (KeyboardInterrupt, ValueError) as error:
            self.caught.append(error)
        return torch.relu(self.last(x)), side


def prepared() -> tuple[Net, QuantizedModel, Tensor]:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(16, 4)
    settings = {
        "global_quantization_settings": {"skip_tail_quantization": False},
        "layer_settings": [{"match": "scale", "skip_quantization": True}],
    }
    quantized = quantize(model, settings, (x,))
    quantized.calibrate([(x,)])
    return model, quantized, x


def roundings(quantized: QuantizedModel, run: Callable[[], Any]) -> int:
    """How many tensors are rounded while something runs."""
    count = 0

    def seen(*args: Any) -> None:
        nonlocal count
        count += 1

    handles = [
        q.register_forward_hook(seen) for q in (*quantized.activations.values(), *(w for ws in quantized.weights.values() for w in ws))
    ]
    run()
    for handle in handles:
        handle.remove()
    return count


def test_the_mode_is_off_within_and_on_behind() -> None:
    model, quantized, x = prepared()
    counts: list[int] = []
    model.scale.act = lambda: counts.append(function_mode_count())
    usual = roundings(quantized, lambda: model(x))
    assert usual >= 4
    assert counts == [0]
    assert function_mode_count() == 0
    assert quantized.drift == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_ends_a_quiet_module_early_ends_nothing_else(error: type[BaseException]) -> None:
    model, quantized, x = prepared()
    usual = roundings(quantized, lambda: model(x))

    def fail() -> None:
        raise error

    model.scale.act = fail
    assert roundings(quantized, lambda: model(x)) == usual
    assert len(model.caught) == 1
    assert function_mode_count() == 0
    model.scale.act = lambda: None
    assert roundings(quantized, lambda: model(x)) == usual


def test_an_interrupt_that_nobody_catches() -> None:
    model, quantized, x = prepared()
    usual = roundings(quantized, lambda: model(x))

    def fail() -> None:
        raise SystemExit

    model.scale.act = fail
    with pytest.raises(SystemExit):
        model(x)
    assert function_mode_count() == 0
    model.scale.act = lambda: None
    assert roundings(quantized, lambda: model(x)) == usual


def test_a_mode_of_the_user_stays_where_it_is() -> None:
    class Watching(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    model, _, x = prepared()
    with Watching() as mode:
        model(x)
        assert function_mode_count() == 1
    assert "special_erf" in mode.names
    other = Net()
    with torch.device("cpu"):
        model(x)
    assert other(x)[0].shape == model(x)[0].shape


class Turning(nn.Module):
    """Calls something else after the capture, in the place of what it called then."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = False

    def forward(self, x: Tensor) -> Tensor:
        return x / 2.0 if self.turned else torch.sin(x)


def test_what_a_module_of_the_users_own_calls_unseen_is_reported() -> None:
    turning = Turning()
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), turning, nn.Linear(8, 2)), torch.randn(16, 4)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([(x,)])
    turning.turned = True
    with pytest.warns(CCOWarning, match="div"):
        model(x)
    assert quantized.drift
