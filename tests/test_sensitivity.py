"""Quantization Sensitivity is the L2 norm between quantized and float output, however it is summed."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
import torch.multiprocessing as mp
from models import ResidualCNN
from torchmetrics.audio import SignalNoiseRatio

from lightning_cco import quantize
from lightning_cco.sensitivity import LayerSensitivities, QuantizationSensitivity, SensitivityReport


def test_one_batch_is_the_norm_of_the_difference() -> None:
    q, f = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    metric = QuantizationSensitivity()
    metric.update(q, f)
    torch.testing.assert_close(metric.compute(), torch.dist(q, f).double(), check_dtype=False, rtol=1e-5, atol=0)
    entry = metric.sensitivity("a")
    assert entry.relative == pytest.approx(float(torch.dist(q, f) / f.norm()), rel=1e-5)
    # torchmetrics' own: the target against what differs from it.
    assert entry.sqnr_db == pytest.approx(float(SignalNoiseRatio()(q.flatten(), f.flatten())), rel=1e-4)


def test_batches_are_averaged_by_their_squares() -> None:
    pairs = [(torch.randn(2, 3), torch.randn(2, 3)) for _ in range(5)]
    metric = QuantizationSensitivity()
    for q, f in pairs:
        metric.update(q, f)
    expected = math.sqrt(sum(float(torch.dist(q, f)) ** 2 for q, f in pairs) / 5)
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(dtype: torch.dtype) -> None:
    f = torch.full((1000,), 100.0, dtype=dtype)
    metric = QuantizationSensitivity()
    metric.update(f * 0, f)
    assert float(metric.compute()) == pytest.approx(100 * math.sqrt(1000))  # float16 itself would overflow


def test_extremes_stay_visible() -> None:
    names = ["equal", "silent", "nan", "inf"]
    metric = LayerSensitivities(names)
    metric.start_batch()
    ones = torch.ones(3)
    metric.update("local", "equal", ones, ones)
    metric.update("local", "silent", ones, 0 * ones)
    metric.update("local", "nan", ones * float("nan"), ones)
    metric.update("local", "inf", ones * float("inf"), ones)
    report = metric.report(["local"])
    assert report.local["equal"].qs == 0
    assert report.local["equal"].sqnr_db == math.inf
    assert report.local["silent"].relative == math.inf
    assert math.isnan(report.local["nan"].qs)
    assert report.local["inf"].qs == math.inf
    assert [entry.name for entry in report.worst_first()][-1] == "equal"
    assert report.worst_first()[0].name in ("nan", "inf")


def test_all_layers_at_once_are_the_single_metrics() -> None:
    together, alone = LayerSensitivities(["a", "b"]), {name: QuantizationSensitivity() for name in "ab"}
    for _ in range(3):
        together.start_batch()
        for name in "ab":
            q, f = torch.randn(2, 4), torch.randn(2, 4)
            together.update("accumulated", name, q, f)
            alone[name].update(q, f)
    report = together.report(["local", "accumulated"])
    assert report.local == {}
    assert report.num_batches == 3
    for name in "ab":
        assert report.accumulated[name].qs == pytest.approx(float(alone[name].compute()))


def test_pickle_and_plain_data() -> None:
    metric = LayerSensitivities(["a"])
    metric.start_batch()
    metric.update("local", "a", torch.zeros(2), torch.ones(2))
    report = pickle.loads(pickle.dumps(metric)).report(["local"])
    assert repr(SensitivityReport.from_dict(report.to_dict())) == repr(report) == repr(metric.report(["local"]))  # NaN equals nothing


def _rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    metric = LayerSensitivities(["a"])
    metric.start_batch()
    metric.update("local", "a", torch.zeros(1), torch.full((1,), 3.0 + rank))
    torch.save(metric.report(["local"]).to_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_are_summed(tmp_path: object) -> None:
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    reports = [torch.load(f"{tmp_path}/{rank}.pt") for rank in range(2)]
    assert str(reports[0]) == str(reports[1])  # NaN, where nothing varies, equals nothing
    assert reports[0]["local"][0]["qs"] == pytest.approx(math.sqrt((9 + 16) / 2))
    assert reports[0]["num_batches"] == 2


def test_local_and_accumulated_of_a_model() -> None:
    torch.manual_seed(0)
    model, x = ResidualCNN().eval(), ResidualCNN.example()
    quantized = quantize(model, None, (x,))
    quantized.calibrate([(x,)])
    outputs: dict[bool, torch.Tensor] = {}
    handle = model.blocks[1].bn2.register_forward_hook(lambda module, args, output: outputs.__setitem__(quantizing, output.clone()))
    with torch.no_grad():
        quantizing = True
        model(x)
        quantizing = False
        with quantized.disabled():
            model(x)
    handle.remove()
    report = quantized.sensitivity([(x,)])
    # The second model of reference is the model itself, run twice and recorded by an ordinary hook.
    assert report.accumulated["batch_norm_4"].qs == pytest.approx(float(torch.dist(outputs[True], outputs[False])), rel=1e-4)
    # Local: batch_norm_4 rounds its output and nothing else.
    rounded = quantized.activations["batch_norm_4"](outputs[False])
    assert report.local["batch_norm_4"].qs == pytest.approx(float(torch.dist(rounded, outputs[False])), rel=1e-4)
    assert report.accumulated["batch_norm_4"].qs > report.local["batch_norm_4"].qs


def test_what_varies_between_samples_is_measured_by_itself() -> None:
    """A constant part of 100 hides from the whole SQNR that rounding leaves nothing of what differs."""
    f = 100.0 + torch.randn(64, 5)
    q = torch.full_like(f, 100.0) + 0.1 * torch.randn(64, 5)
    metric = QuantizationSensitivity()
    metric.update(q, f)
    entry = metric.sensitivity("a")
    deviations = q - q.mean(0), f - f.mean(0)
    assert entry.varying_sqnr_db == pytest.approx(float(SignalNoiseRatio()(deviations[0].flatten(), deviations[1].flatten())), abs=1e-3)
    assert entry.sqnr_db > 35
    assert entry.varying_relative > 0.9


def test_the_varying_part_of_a_large_tensor_is_taken_of_the_same_values_of_each_sample() -> None:
    f = torch.randn(8, 16, 64, 64, generator=torch.Generator().manual_seed(0)) + torch.linspace(0, 50, 64)
    q = f + 0.1 * torch.randn(f.shape, generator=torch.Generator().manual_seed(1))
    for layout in (torch.contiguous_format, torch.channels_last):
        metric = QuantizationSensitivity()
        metric.update(q.contiguous(memory_format=layout), f.contiguous(memory_format=layout))
        assert metric.sensitivity("a").varying_relative == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("shape", [(), (1, 4), (0, 4), (5,)])
def test_outputs_in_which_nothing_varies_have_no_varying_part(shape: tuple[int, ...]) -> None:
    metric = QuantizationSensitivity()
    metric.update(torch.ones(shape), torch.ones(shape))
    assert math.isnan(metric.sensitivity("a").varying_relative)
