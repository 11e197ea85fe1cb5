"""Models of which a part is quantized already: by another call of quantize, by torch.ao, by classes of other packages, by integers of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning_modules import Classifier, batches, make_trainer, quick
from torch import Tensor, nn

from lightning_cco import CCOError, CCOWarning, quantize
from lightning_cco.graph.hooks import hooks_on

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def around(part: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), part, nn.ReLU(), nn.Linear(8, 2))


def dynamic() -> nn.Module:
    return around(torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear}, dtype=torch.qint8))


def prepared(qat: bool) -> nn.Module:
    part = nn.Sequential(nn.Linear(8, 8)).train(qat)
    part.qconfig = (torch.ao.quantization.get_default_qat_qconfig if qat else torch.ao.quantization.get_default_qconfig)("fbgemm")
    return around((torch.ao.quantization.prepare_qat if qat else torch.ao.quantization.prepare)(part))


def converted() -> nn.Module:
    part = nn.Sequential(torch.ao.quantization.QuantStub(), nn.Linear(8, 8), torch.ao.quantization.DeQuantStub()).eval()
    part.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
    observed = torch.ao.quantization.prepare(part)
    observed(X)
    return around(torch.ao.quantization.convert(observed))


class OfAnotherPackage(nn.Linear):
    """As a linear layer of bitsandbytes is told."""


OfAnotherPackage.__module__, OfAnotherPackage.__qualname__ = "bitsandbytes.nn.modules", "Linear8bitLt"


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8).dequantize()


PARTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dynamic": (dynamic, r"'1\.0' \(torch\.ao\.nn\.quantized\.dynamic\.\S+\.Linear\)"),
    "prepared": (lambda: prepared(False), r"'1\.0\.activation_post_process' \(torch\.ao\.quantization\.observer"),
    "prepared for training": (lambda: prepared(True), r"'1\.0' \(torch\.ao\.nn\.qat\.\S+\.Linear\)"),
    "converted": (converted, r"'1\.0' \(torch\.ao\.nn\.quantized\.modules\.Quantize\).*'1\.1' \(torch\.ao\.nn\.quantized"),
    "another package": (lambda: around(OfAnotherPackage(8, 8)), r"'1' \(bitsandbytes\.nn\.modules\.\w+\)"),
    "a function": (lambda: around(Functional()), r"'1' \(it calls quantize_per_tensor\)"),
}


@pytest.mark.filterwarnings("ignore:.*(torch.ao.quantization|reduce_range|quantized)")
@pytest.mark.parametrize("kind", PARTS)
def test_parts_that_something_else_has_quantized_are_named(kind: str) -> None:
    make, said = PARTS[kind]
    with pytest.raises(CCOError, match=f"quantized already, by something else: {said}"):
        quantize(make(), None, (X,))


class Stubs(nn.Module):
    """What PyTorch's quantizable models consist of; nobody has quantized it."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        self.body, self.add = network(), torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.leave(self.body(self.add.add(x, x)))


def test_a_model_that_may_be_quantized_is_in_float() -> None:
    assert {"linear", "linear_1"} <= set(quantize(Stubs(), None, (X,)).plan.quantized)


class Integers(nn.Module):
    """A linear layer with integer weights of its own, packed or not."""

    def __init__(self, parameter: bool) -> None:
        super().__init__()
        weight: Any = torch.randint(-127, 128, (8, 8), dtype=torch.int8)
        if parameter:
            self.stored = nn.Parameter(weight, requires_grad=False)
        else:
            self.register_buffer("stored", weight)
        self.register_buffer("index", torch.arange(16).reshape(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.stored.to(x.dtype) * 0.01)


@pytest.mark.parametrize("parameter", [False, True])
def test_weights_that_are_made_of_integers_are_named(parameter: bool) -> None:
    with pytest.warns(CCOWarning, match=r"made of integers, '1\.stored', so another tool has quantized"):
        quantize(around(Integers(parameter)), None, (X,))


def test_a_callback_does_not_take_the_hooks_off_a_part(tmp_path: Any) -> None:
    model = Classifier()
    path, part = next((path, module) for path, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
    example = torch.randn(2, *((part.in_features,) if isinstance(part, nn.Linear) else (part.in_channels, 8, 8)))
    inner = quantize(part, None, (example,))
    with pytest.raises(CCOError, match=rf"its part '{path}' \({type(part).__name__}\) is quantized already, separately.*\.remove\(\)"):
        make_trainer(tmp_path, quick()).fit(model, batches(), batches(seed=5))
    assert hooks_on(part) is inner.runtime.frames
