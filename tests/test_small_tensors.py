"""Small tensors are rounded in fewer steps than others: with the same values and gradients, to the last bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import quantize
from lightning_cco.quantization import native, small_tensors, weight_quantizer
from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.weight_quantizer import WeightQuantizer

pytestmark = pytest.mark.skipif(native.load() is None, reason="there is no C compiler")

CLAMPS = [None, (0.0, float("inf")), (0.0, 6.0), (-1.0, 1.0), (-0.3, float("inf")), (2.0, 3.0), (-50.0, -40.0)]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """Runs something as if all tensors were large."""

    def run(what: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(small_tensors, "SMALL", -1)
            return what()

    return run


def quantizer(bits: int, symmetric: bool, low: float = -1.3, high: float = 2.1) -> ActivationQuantizer:
    made = ActivationQuantizer(bits, symmetric)
    made.observe(torch.tensor([low, high]))
    made.finish_calibration()
    return made


def values(dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, zeros of both signs, ends, ties between levels and their neighbours."""
    torch.manual_seed(0)
    step = 3.4 / 255
    ties = (torch.arange(-300, 300) + 0.5) * step
    near = [torch.nextafter(ties, torch.tensor(end)) for end in (torch.inf, -torch.inf)]
    special = torch.tensor([0.0, -0.0, 6.0, 1.0, -1.0, -0.3, 1e30, -1e30, torch.inf, -torch.inf, 1e-45, -1e-45])
    return torch.cat([torch.randn(2000) * 2, ties, *near, special]).to(dtype)


def outcome(module: ActivationQuantizer, x: Tensor, clamp: tuple[float, float] | None, inplace: bool, track: bool) -> list[Tensor]:
    module.forget_batch()
    leaf = x.clone().requires_grad_()
    y = module(leaf * 1.0, clamp, inplace, track)
    torch.manual_seed(1)
    gradient = torch.randn_like(y)
    gradient.view(-1)[::7] = torch.inf
    y.backward(gradient)
    return [y.detach(), leaf.grad, module.extrema.clone()]


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(nan=7.0), other.nan_to_num(nan=7.0))


@pytest.mark.parametrize("track", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clamp", CLAMPS, ids=str)
def test_activations(clamp: Any, dtype: torch.dtype, inplace: bool, track: bool, large: Any) -> None:
    for bits, symmetric in ((8, False), (8, True), (3, False), (2, True)):
        module = quantizer(bits, symmetric)
        small = outcome(module, values(dtype), clamp, inplace, track)
        assert_same(small, large(lambda: outcome(module, values(dtype), clamp, inplace, track)))  # noqa: B023


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(1, 2),
        lambda x: x[:, :, ::2],
        lambda x: x[:, :1].expand(-1, 5, -1, -1),
    ],
)
def test_layouts(layout: Any, inplace: bool, large: Any) -> None:
    module = quantizer(8, False)
    torch.manual_seed(0)
    base = torch.randn(3, 4, 6, 8)

    def run() -> list[Tensor]:
        leaf = base.clone().requires_grad_()
        x = layout(leaf * 1.0)
        y = module(x if not inplace else x.clone(), (0.0, 6.0), inplace, True)
        y.square().sum().backward()
        return [y.detach(), leaf.grad]

    assert_same(run(), large(run))


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 0.3, 1.0, 7e4, 1e20])
def test_scales(scale: float, large: Any) -> None:
    module = quantizer(8, False, -30 * scale, 60 * scale)
    x = torch.linspace(-50, 80, 4001) * scale
    assert_same(outcome(module, x, None, False, False), large(lambda: outcome(module, x, None, False, False)))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_nan_has_no_gradient(inplace: bool, large: Any) -> None:
    x = values()
    x[5] = torch.nan
    module = quantizer(8, False)
    small = outcome(module, x, (0.0, 6.0), inplace, True)
    assert_same(small, large(lambda: outcome(module, x, (0.0, 6.0), inplace, True)))
    assert small[1][5] == 0


def test_the_gradient_has_a_gradient() -> None:
    module, x = quantizer(8, False), torch.randn(50, requires_grad=True)
    (first,) = torch.autograd.grad((module(x * 1.0) ** 3).sum(), x, create_graph=True)
    first.sum().backward()
    assert x.grad.abs().sum() > 0


def test_tensors_that_are_changed_in_place_keep_the_rules_of_autograd() -> None:
    module = quantizer(8, False)
    leaf = torch.randn(20, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        module(leaf, (0.0, 6.0), True)
    seen: list[Tensor] = []
    x = leaf * 1.0
    x.retain_grad()
    x.register_hook(lambda gradient: seen.append(gradient.clone()))
    y = module(x, (0.0, 6.0), True)
    assert y is x
    (y * 3).sum().backward()
    assert torch.equal(x.grad, torch.full((20,), 3.0))
    assert torch.equal(seen[0], leaf.grad)
    z = leaf * 1.0
    kept = z.exp()  # the backward of exp reads its result alone
    saved = z.sin()  # that of sin what it has read
    module(z, (0.0, 6.0), True)
    kept.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((16, 3, 3, 3), 0), ((6, 8, 2, 2), 1), ((40, 30), 0), ((7,), 0), ((3, 0), 0)], ids=str)
@pytest.mark.parametrize("bits", [8, 2])
def test_weights(bits: int, shape: tuple[int, ...], axis: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    module = WeightQuantizer(bits, axis, "auto")
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape).to(dtype))

    def run() -> list[Tensor]:
        weight.grad = None
        rounded = module(weight, [])
        (rounded * rounded.detach()).sum().backward()
        return [rounded.detach(), weight.grad]

    small = run()
    monkeypatch.setattr(weight_quantizer, "fake_quantize_small_weight", lambda *args: None)
    assert_same(small, run())


def test_a_training_is_the_same(large: Any) -> None:
    """Convolutions with and without ReLU in place, a linear layer on three dimensions, additions: weights after some steps."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
            self.relu, self.fc, self.out = nn.ReLU(inplace=True), nn.Linear(64, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.relu(self.norm(self.a(x)))
            h = F.relu6(h + self.b(h)).flatten(2)
            return self.out(self.fc(h).tanh()).mean(1)

    torch.manual_seed(0)
    original, x = Net(), torch.randn(4, 3, 8, 8)

    def run() -> list[Tensor]:
        model = copy.deepcopy(original).train()
        quantized = quantize(model, {"global_quantization_settings": {"skip_tail_quantization": False}}, (x,))
        quantized.calibrate([(x,)])
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(4):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        return [*(p.detach() for p in model.parameters()), *(q.scale for q in quantized.activations.values())]

    assert_same(run(), large(run))
