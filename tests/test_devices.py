"""What runs on a GPU: torch operations and Triton's kernels against torch's own operation, and a quantized network against the CPU.

On a machine without one the same tests run on the CPU, with the torch operations that a GPU without Triton computes with, and Triton's kernels in its
interpreter. `make test-gpu` runs all that a GPU is needed for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gradients import with_gradient
from kernels_off import turn_kernels_off
from lightning.pytorch.strategies import DDPStrategy
from lightning_modules import Classifier, Losses, batches, make_trainer, quick
from models import ResidualCNN
from torch import Tensor
from triton_here import DEVICE, as_on_a_gpu, needs_triton, use_triton

from lightning_cco import quantize
from lightning_cco.quantization import fake_quantize as fake_quantize_module
from lightning_cco.quantization.fake_quantize import fake_quantize
from lightning_cco.quantization.qparams import affine_qparams, quant_range, weight_scale
from lightning_cco.quantization.triton_calls import device_kernels_for
from lightning_cco.quantization.weight_fake_quantize import fake_quantize_weight

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(params=["operations", pytest.param("triton", marks=needs_triton)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton":
        use_triton(monkeypatch)
    else:
        turn_kernels_off(monkeypatch)
        monkeypatch.setattr(fake_quantize_module, "device_kernels_for", lambda tensor: None)
        as_on_a_gpu(monkeypatch)
    return DEVICE


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
        if losses:
            monkeypatch.undo()  # the reference: the compiled kernels
        torch.manual_seed(0)
        model, batches = ResidualCNN(), [ResidualCNN.example() for _ in range(2)]
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


@needs_a_gpu
def test_a_gpu_has_kernels() -> None:
    assert device_kernels_for(torch.ones(1, device="cuda")) is not None


@needs_a_gpu
def test_in_a_captured_graph() -> None:
    """What moves between replays, values and scale, is read from the device's memory."""
    x, grad = torch.randn(5000, device="cuda", requires_grad=True), torch.randn(5000, device="cuda")
    weight = torch.randn(64, 300, device="cuda", requires_grad=True)
    scale, zero_point, ends = torch.tensor(0.02, device="cuda"), torch.tensor(100.0, device="cuda"), torch.zeros(2, device="cuda")

    def step() -> tuple[Tensor, Tensor, Tensor]:
        y = fake_quantize(x * 1.0, scale, zero_point, 8, extrema=ends)
        z = fake_quantize_weight(weight, 2, 0, mse=True)
        return y.detach(), z.detach(), torch.autograd.grad(y, x, grad)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        scale.fill_(0.003)
        x.mul_(2.0)
        weight.mul_(3.0)
        ends.zero_()
    graph.replay()
    replayed, reached = [tensor.clone() for tensor in captured], ends.clone()
    ends.zero_()
    assert all(torch.equal(got, expected) for got, expected in zip((*replayed, reached), (*step(), ends), strict=True))


@needs_a_gpu
@pytest.mark.parametrize(
    "recipe", [{}, {"training_settings": {"range_estimator": "learned", "weight_estimator": "learned"}}], ids=["moving", "learned"]
)
def test_pytorch_sees_no_synchronization_in_a_step(recipe: Any) -> None:
    torch.manual_seed(0)
    model, batches = ResidualCNN().cuda().train(), [ResidualCNN.example().cuda() for _ in range(4)]
    quantized = quantize(model, recipe, (batches[0],))
    quantized.calibrate([(batches[0],)])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for number, batch in enumerate(batches):
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_a_gpu
@pytest.mark.slow
def test_more_values_than_32_bits_count() -> None:
    count = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 6 * count:
        pytest.skip("the GPU has too little free memory")
    x = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    x[-3:] = torch.tensor([-9.0, 0.517, 9.0])
    ends = torch.zeros(2, device="cuda")
    with torch.no_grad():
        y = fake_quantize(x, torch.tensor(0.01, device="cuda"), torch.tensor(128.0, device="cuda"), 8, extrema=ends, inplace=True)
    assert y[-3:].tolist() == torch.tensor([-1.28, 0.52, 1.27]).bfloat16().tolist()
    assert ends.tolist() == [-9.0, 9.0]
    assert not y[:-3].any()


@pytest.mark.filterwarnings("ignore:.*(does not have many workers|not resumable|max_epochs|LeafSpec|barrier|device_id|No device id).*")
def test_ddp_on_one_device(tmp_path: Path) -> None:
    """By NCCL on a GPU, by gloo without one: the losses are those of the same training without DDP."""
    found = []
    for strategy in ("auto", DDPStrategy(process_group_backend="nccl" if DEVICE == "cuda" else "gloo")):
        torch.manual_seed(0)
        module, losses = Classifier(), Losses()
        options = {
            "strategy": strategy,
            "accelerator": "gpu" if DEVICE == "cuda" else "cpu",
            "max_epochs": 2,
            "use_distributed_sampler": False,
        }
        try:
            make_trainer(tmp_path, quick(), losses, **options).fit(module, batches())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        found.append(losses.values)
    assert len(found[0]) == 8
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-6)
