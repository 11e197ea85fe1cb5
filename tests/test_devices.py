"""What runs on a GPU: the kernels against torch's own operation, and a quantized network against the CPU.

On a machine without one the same tests run on the CPU with torch operations alone, which is what a GPU computes with.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradients import with_gradient
from kernels_off import turn_kernels_off
from models import ResidualCNN
from torch import Tensor

from lightning_cco import quantize
from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.fake_quantize import fake_quantize
from lightning_cco.quantization.qparams import affine_qparams, quant_range, weight_scale
from lightning_cco.quantization.weight_fake_quantize import fake_quantize_weight

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"))


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    turn_kernels_off(monkeypatch)
    monkeypatch.setattr(ActivationQuantizer, "numbers", lambda self, device="cpu": None)
    return request.param


@pytest.mark.parametrize("num_bits", [2, 4, 8])
@pytest.mark.parametrize("clamp", [None, (0.0, 6.0)], ids=str)
def test_activations_are_torchs_own_operation(device: str, num_bits: int, clamp: Any) -> None:
    torch.manual_seed(0)
    x, grad = (3 * torch.randn(5000)).to(device), torch.randn(5000).to(device)
    scale, zero_point = (entry.to(device) for entry in affine_qparams(torch.tensor(-2.0), torch.tensor(3.0), num_bits))
    low, high = quant_range(num_bits, symmetric=False)

    def apart(t: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(t if clamp is None else t.clamp(*clamp), float(scale), int(zero_point), low, high)

    got = with_gradient(lambda t: fake_quantize(t, scale, zero_point, num_bits, clamp=clamp), x, grad)
    expected = with_gradient(apart, x, grad)
    torch.testing.assert_close(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    assert got[0].device.type == device


@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_weights_are_torchs_own_operation(device: str, num_bits: int) -> None:
    torch.manual_seed(0)
    weight, grad = torch.randn(16, 8, 3, 3, device=device), torch.randn(16, 8, 3, 3, device=device)
    scale, limit = weight_scale(weight, num_bits, 0).flatten(), quant_range(num_bits, symmetric=True)[1]
    got = with_gradient(lambda t: fake_quantize_weight(t, num_bits, 0), weight, grad)
    zero = torch.zeros(16, dtype=torch.int32, device=device)
    expected = with_gradient(lambda t: torch.fake_quantize_per_channel_affine(t, scale, zero, 0, -limit, limit), weight, grad)
    torch.testing.assert_close(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "moving"])
def test_a_quantized_network_trains_as_with_the_kernels_of_the_cpu(device: str, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[list[float]] = []
    for where in (device, "cpu"):
        if where == "cpu" and losses:
            monkeypatch.undo()  # the reference: the compiled kernels
        torch.manual_seed(0)
        model, batches = ResidualCNN(), [ResidualCNN.example() for _ in range(4)]
        model, batches = model.to(where).train(), [batch.to(where) for batch in batches]
        quantized = quantize(model, None, (batches[0],))
        quantized.calibrate([(batches[0],)])
        if frozen:
            quantized.freeze_ranges()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        found = []
        for batch in batches:
            loss = model(batch).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
        losses.append(found)
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-3 if device == "cuda" else 1e-6, atol=1e-6)
