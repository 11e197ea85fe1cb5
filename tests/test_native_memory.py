"""The kernels write only where there is room, whatever types and devices are the default, and only while nobody traces or transforms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from lightning_cco import CCOError, quantize
from lightning_cco.quantization import native
from lightning_cco.quantization.native import kernels_for
from lightning_cco.quantization.tracing import runs_plainly
from lightning_cco.quantization.weight_fake_quantize import fake_quantize_weight
from lightning_cco.quantization.weight_recompute import RecomputedWeight

pytestmark = pytest.mark.skipif(native.load() is None, reason="there is no C compiler")

DEFAULTS = [torch.float64, torch.bfloat16, torch.float16, "meta"]


@pytest.fixture
def default(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Another default type or device."""
    if request.param == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def network(dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    options = {"dtype": dtype, "device": "cpu"}
    layers = [nn.Linear(24, 512, **options), nn.ReLU(), nn.Linear(512, 256, **options), nn.ReLU(), nn.Linear(256, 4, **options)]
    return nn.Sequential(*layers), torch.linspace(-1, 1, 8 * 24, dtype=torch.float64, device="cpu").reshape(8, 24).to(dtype)


def trained_gradients(dtype: torch.dtype) -> list[torch.Tensor]:
    model, x = network(dtype)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    quantized.sensitivity([x])
    model(x).square().sum().backward()
    quantized.update_ranges()
    return [p.grad for p in model.parameters() if p.grad is not None] + [q.scale for q in quantized.activations.values()]


expected = {dtype: trained_gradients(dtype) for dtype in (torch.float32, torch.bfloat16)}


@pytest.mark.parametrize("default", DEFAULTS, indirect=True, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_under_other_defaults(default: Any, dtype: torch.dtype) -> None:
    torch.set_default_dtype(torch.float32 if default == "meta" else default)
    assert all(torch.equal(a, b) for a, b in zip(trained_gradients(dtype), expected[dtype], strict=True))


@pytest.mark.parametrize("default", DEFAULTS, indirect=True, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_behind_the_scales_is_written(default: Any, dtype: torch.dtype) -> None:
    weight = torch.linspace(-1, 1, 256 * 64, dtype=torch.float32, device="cpu").reshape(256, 64).to(dtype)
    kernels = native.load()
    recomputed = RecomputedWeight(weight, 0, kernels)
    assert (recomputed.scales.dtype, recomputed.scales.device.type, recomputed.scales.nbytes) == (torch.float32, "cpu", 1024)
    fake_quantize_weight(weight, 8, 0, recomputed)
    operation = torch.ops.lightning_cco.weight_scale(weight, 0, 127, 1e-12)
    assert operation.dtype == torch.float32
    assert torch.equal(operation.flatten(), recomputed.scales)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, 7, dtype=dtype)


@pytest.mark.parametrize(
    "call",
    [
        lambda k, x: k.fake_quantize(x, empty(64, dtype=torch.bfloat16), 0.1, (0, 9), (0, 9), (0, 9), None, None),
        lambda k, x: k.fake_quantize(x, empty(63), 0.1, (0, 9), (0, 9), (0, 9), None, None),
        lambda k, x: k.fake_quantize(x, x.clone(), 0.1, (0, 9), (0, 9), (0, 9), empty(7, dtype=torch.uint8), None),
        lambda k, x: k.fake_quantize(x, x.clone(), 0.1, (0, 9), (0, 9), (0, 9), None, empty(2, dtype=torch.bfloat16)),
        lambda k, x: k.fake_quantize(empty(1).expand(64), empty(64), 0.1, (0, 9), (0, 9), (0, 9), None, None),
        lambda k, x: k.widen(x, (0, 9), empty(1)),
        lambda k, x: k.widen(x.to("meta"), (0, 9), empty(2)),
        lambda k, x: k.mask_gradient(x, empty(8, 8).t(), empty(8, dtype=torch.uint8)),
        lambda k, x: k.fake_quantize_weight(x.view(8, 8), empty(8, 8), 0, 127, 1e-12, empty(8, dtype=torch.float16)),
        lambda k, x: k.weight_scale(x.view(8, 8), 0, 127, 1e-12, empty(4)),
        lambda k, x: k.energies(x, empty(64, dtype=torch.float64)),
    ],
)
def test_a_pointer_that_does_not_fit_is_an_error(call: Any) -> None:
    with pytest.raises(CCOError, match=r"kernels: expected .*Nothing was read or written"):
        call(native.load(), torch.ones(64))


def test_memory_taken_away_is_an_error() -> None:
    x = torch.ones(64)
    x.untyped_storage().resize_(0)
    with pytest.raises(CCOError, match="in 0 bytes"):
        native.load().widen(x, (0, 9), torch.zeros(2))


def test_only_plain_tensors_have_kernels() -> None:
    x = torch.ones(4)
    assert kernels_for(x) is not None
    with torch.inference_mode():
        assert kernels_for(torch.ones(4)) is not None
    negative = torch.ones(4, dtype=torch.cfloat).conj().imag
    assert negative.is_neg()
    for other in (negative, torch._efficientzerotensor(4), x.to("meta"), x.double(), x.to_sparse(), x[:1].expand(4)):
        assert kernels_for(other) is None
    assert runs_plainly()


def test_no_kernels_while_somebody_traces_or_transforms() -> None:
    from torch._subclasses import FakeTensorMode
    from torch.autograd import forward_ad
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils.flop_counter import FlopCounterMode

    seen: list[bool] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(kernels_for(x) is not None or runs_plainly())
        return x.sum()

    x = torch.ones(4)
    torch.jit.trace(look, (x,), check_trace=False)
    make_fx(look)(x)
    make_fx(look, pre_dispatch=True)(x)
    torch.func.grad(look)(x)
    torch.func.vmap(look)(x)
    torch.func.jvp(look, (x,), (x,))
    for mode in (FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False), forward_ad.dual_level()):
        with mode:
            look(x)
    assert len(seen) == 9
    assert not any(seen)
    assert kernels_for(x) is not None
