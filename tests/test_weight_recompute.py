"""Rounded weights that are made again in the backward: the same gradients, less memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_cco import quantize
from lightning_cco.errors import CCOError
from lightning_cco.quantization import native, weight_quantizer, weight_recompute
from lightning_cco.quantization.native import kernels_for
from lightning_cco.quantization.weight_fake_quantize import fake_quantize_weight
from lightning_cco.quantization.weight_recompute import RecomputedWeight

pytestmark = pytest.mark.skipif(native.load() is None, reason="there is no C compiler")


@pytest.fixture(autouse=True)
def weights_of_50_000_values_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (weight_quantizer, weight_recompute):
        monkeypatch.setattr(module, "LEAST_RECOMPUTED", 50_000)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up, self.flat = nn.Conv2d(4, 64, 8), nn.ConvTranspose2d(64, 8, 8), nn.Linear(8 * 16 * 16, 16)
        self.rnn, self.head = nn.LSTM(16, 64, batch_first=True), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.flat(self.up(F.relu(self.conv(x))).flatten(1))
        return self.head(self.rnn(h[:, None].expand(-1, 3, -1))[0])


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    model(x).square().sum().backward()
    return [x.grad, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("num_bits", [2, 8])
@pytest.mark.parametrize(("shape", "axis"), [((64, 300), 0), ((20, 30, 5, 7), 1), ((300, 70), 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_made_is_what_was_remade(num_bits: int, shape: tuple[int, ...], axis: int, dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    recomputed = RecomputedWeight(weight, axis, kernels_for(weight))
    rounded = fake_quantize_weight(weight, num_bits, axis, recomputed)
    assert torch.equal(rounded, fake_quantize_weight(weight, num_bits, axis))
    again = recomputed.make()
    assert again.data_ptr() != rounded.data_ptr()  # somebody holds what was made first
    assert torch.equal(again, rounded)


def test_weights_in_channels_last_are_made_again_where_they_were() -> None:
    weight = torch.randn(20, 30, 5, 7).to(memory_format=torch.channels_last)
    recomputed = RecomputedWeight(weight, 0, kernels_for(weight))
    rounded = fake_quantize_weight(weight, 4, 0, recomputed, mse=True)
    again = recomputed.make()
    assert rounded.stride() == again.stride() == weight.stride()
    assert torch.equal(again, rounded)
    assert torch.equal(again, fake_quantize_weight(weight.contiguous(), 4, 0, mse=True))


def test_gradients_are_the_same_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(2, 4, 16, 16), Layers()
    plain = copy.deepcopy(model)
    for module in (weight_quantizer, weight_recompute):
        monkeypatch.setattr(module, "LEAST_RECOMPUTED", 1 << 14)
    made: list[int] = []
    original = RecomputedWeight.make
    monkeypatch.setattr(RecomputedWeight, "make", lambda self: made.append(self.weight.numel()) or original(self))
    for one in (model, plain):
        quantize(one, {"global_quantization_settings": {"skip_tail_quantization": False}}, (x,)).calibrate([(x,)])
    found = gradients(model, x)
    assert {model.conv.weight.numel(), model.up.weight.numel(), model.flat.weight.numel()} <= set(made)
    monkeypatch.setattr(weight_quantizer, "recomputed_weight", lambda weight, axis: None)
    made.clear()
    for got, expected in zip(found, gradients(plain, x), strict=True):
        assert torch.equal(got, expected)
    assert made == []


def test_the_float_copies_take_the_same_memory_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nothing is won: each is free once its layer has run."""
    addresses: list[int] = []
    original = weight_quantizer.fake_quantize_weight

    def watched(*args: Any) -> Tensor:
        result = original(*args)
        addresses.append(result.data_ptr())
        return result

    monkeypatch.setattr(weight_quantizer, "fake_quantize_weight", watched)
    model, x = nn.Sequential(nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 2)), torch.randn(4, 200)
    quantize(model, None, (x,)).calibrate([(x,)])
    addresses.clear()
    model(x).sum().backward()
    assert len(addresses) == 2
    assert addresses[0] == addresses[1]


def test_hooks_of_others_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint counts what is saved, offloading wants to see it: then weights are saved as they are."""
    monkeypatch.setattr(weight_recompute, "RecomputedWeight", lambda *args: pytest.fail("made again"))
    model, x = nn.Sequential(nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 2)), torch.randn(4, 200, requires_grad=True)
    quantize(model, None, (x.detach(),)).calibrate([(x.detach(),)])
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor):
        model(x).sum().backward()
    assert 200 * 300 in saved
    checkpoint(model, x, use_reentrant=False).sum().backward()


def test_a_weight_that_changed_before_the_backward_is_an_error_as_in_float() -> None:
    model, x = nn.Sequential(nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 2)), torch.randn(4, 200, requires_grad=True)
    for error, message in ((RuntimeError, "modified by an inplace operation"), (CCOError, r"\(300, 200\) was modified in place")):
        loss = model(x).sum()
        with torch.no_grad():
            model[0].weight.mul_(2)
        with pytest.raises(error, match=message):
            loss.backward()
        if error is RuntimeError:
            quantize(model, None, (x.detach(),)).calibrate([(x.detach(),)])


def test_where_nothing_may_be_handled_or_tracked_weights_are_kept() -> None:
    model, x = nn.Sequential(nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 2)), torch.randn(4, 200)
    quantize(model, None, (x,)).calibrate([(x,)])
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        model(x).sum().backward()
    assert model[0].weight.grad is not None
    with torch.inference_mode():
        made = nn.Sequential(nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 2)).requires_grad_(False)
    quantize(made, None, (x,)).calibrate([(x,)])
    assert made(x).shape == (4, 2)
