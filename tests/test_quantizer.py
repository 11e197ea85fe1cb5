"""Quantizers hold ranges that follow their estimator, survive what Lightning does to modules, and agree between processes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.qparams import affine_qparams, quant_range
from lightning_cco.quantization.range_updates import sync_calibration, update_ranges
from lightning_cco.quantization.ranges import batch_range, best_clip_ratio, clip_errors, percentile_range
from lightning_cco.quantization.weight_fake_quantize import fake_quantize_weight
from lightning_cco.quantization.weight_quantizer import WeightQuantizer


def calibrated(*batches: torch.Tensor, **options: object) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(**options)
    quantizer.start_calibration()
    for batch in batches:
        quantizer.observe(batch)
    assert quantizer.finish_calibration() == "ok"
    return quantizer


def test_batch_range() -> None:
    x = 4 * torch.randn(50)
    assert batch_range(x) == (x.min(), x.max())


@pytest.mark.parametrize("percentile", [99.0, 99.9, 100.0])
def test_percentile_is_numpys(percentile: float) -> None:
    x = torch.randn(5000)
    low, high = percentile_range(x, percentile)
    expected = np.percentile(x.numpy(), [100 - percentile, percentile])
    np.testing.assert_allclose([float(low), float(high)], expected, rtol=1e-4)


@pytest.mark.parametrize("num_bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_ratio_is_the_best_of_those_tried(num_bits: int, symmetric: bool) -> None:
    x = torch.randn(2000)
    x[0] = 30.0
    low, high = x.min(), x.max()
    found = float(best_clip_ratio(clip_errors(x, low, high, num_bits, symmetric)))
    quant_min, quant_max = quant_range(num_bits, symmetric)

    def loss(ratio: float) -> float:
        scale, zero_point = affine_qparams(low * ratio, high * ratio, num_bits, symmetric)
        y = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), quant_min, quant_max)
        return float((y - x).square().mean())

    losses = {ratio / 40: loss(ratio / 40) for ratio in range(1, 41)}
    assert losses[min(losses, key=lambda r: abs(r - found))] == pytest.approx(min(losses.values()), rel=1e-4)
    if num_bits < 8:
        assert found < 1.0  # one outlier must not decide


def test_min_max_and_mean_over_calibration() -> None:
    batches = [torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 1.0]), torch.tensor([-2.0, 6.0])]
    widest = calibrated(*batches, estimator="min_max")
    assert (float(widest.min_val), float(widest.max_val)) == (-3.0, 6.0)
    mean = calibrated(*batches, estimator="moving_average")
    assert (float(mean.min_val), float(mean.max_val)) == pytest.approx((-2.0, 3.0))


def bounds(quantizer: ActivationQuantizer) -> tuple[float, float]:
    return float(quantizer.min_val), float(quantizer.max_val)


def test_training_moves_the_range_by_the_averaging_constant() -> None:
    quantizer = calibrated(torch.tensor([-1.0, 1.0]), averaging_constant=0.1)
    quantizer(torch.tensor([-2.0, 1.0]), track=True)
    quantizer(torch.tensor([0.0, 3.0]), track=True)
    assert bounds(quantizer) == (-1.0, 1.0)  # within a step the range is frozen
    update_ranges([quantizer])
    assert bounds(quantizer) == pytest.approx((-1.1, 1.2))
    quantizer(torch.tensor([-9.0, 9.0]))
    update_ranges([quantizer])  # nothing was watched
    quantizer(torch.tensor([-9.0, 9.0]), track=True)
    quantizer.freeze()
    update_ranges([quantizer])
    quantizer.unfreeze()
    update_ranges([quantizer])  # what passed before the freeze is forgotten
    assert bounds(quantizer) == pytest.approx((-1.1, 1.2))
    quantizer(torch.tensor([-9.0, 9.0]), clamp=(0.0, float("inf")), track=True)
    update_ranges([quantizer])
    assert bounds(quantizer) == pytest.approx((-0.99, 1.98))


def test_many_ranges_move_as_each_would_alone() -> None:
    formats = [(8, False), (4, True), (8, True), (8, False)]
    together, alone = ([ActivationQuantizer(bits, symmetric) for bits, symmetric in formats] for _ in range(2))
    for quantizers in (together, alone):
        torch.manual_seed(0)
        for quantizer in quantizers:
            quantizer.observe(torch.randn(9))
            quantizer.finish_calibration()
            quantizer(3 * torch.randn(9), track=True)
    update_ranges(together)
    for quantizer in alone:
        update_ranges([quantizer])
    x = torch.randn(50)
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one(x), other(x))
        expected = affine_qparams(one.min_val, one.max_val, one.num_bits, one.symmetric)
        assert (one.scale, one.zero_point) == expected
        assert one.numbers() == (float(one.scale), float(one.zero_point))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_moves_no_range(value: float) -> None:
    quantizer = calibrated(torch.tensor([-1.0, 1.0]))
    quantizer(torch.tensor([0.5, value]), track=True)
    update_ranges([quantizer])
    assert bounds(quantizer) == (-1.0, 1.0)
    quantizer(torch.tensor([-3.0, 3.0]), track=True)
    update_ranges([quantizer])
    assert bounds(quantizer) == pytest.approx((-1.1, 1.1))


def test_a_range_of_nothing_but_zeros_takes_the_first_values_whole() -> None:
    quantizer = calibrated(torch.zeros(4))
    quantizer(torch.zeros(4), track=True)
    update_ranges([quantizer])
    assert bounds(quantizer) == (0.0, 0.0)
    quantizer(torch.tensor([-3.0, 5.0]), track=True)
    update_ranges([quantizer])
    assert bounds(quantizer) == (-3.0, 5.0)


def test_evidence_of_trouble() -> None:
    quantizer = ActivationQuantizer()
    quantizer.start_calibration()
    quantizer.observe(torch.tensor([1.0, float("inf")]))
    assert quantizer.finish_calibration() == "non_finite"
    quantizer.start_calibration()
    assert quantizer.finish_calibration() == "never_observed"


def test_ranges_travel_as_plain_data_to_the_last_bit(tmp_path: Path) -> None:
    quantizer = calibrated(torch.randn(100), estimator="mse")
    torch.save(quantizer.get_ranges(), tmp_path / "ranges.pt")
    other = ActivationQuantizer()
    other.set_ranges(torch.load(tmp_path / "ranges.pt", weights_only=True))
    x = torch.randn(50)
    assert torch.equal(other(x), quantizer(x))
    fewer = ActivationQuantizer(num_bits=4)
    fewer.set_ranges(quantizer.get_ranges())
    assert float(fewer.scale) == pytest.approx(float(quantizer.scale) * 17, rel=1e-5)


def test_buffers_written_under_inference_mode_can_be_trained_with() -> None:
    quantizer = ActivationQuantizer()
    with torch.inference_mode():
        quantizer.observe(torch.randn(10))
        quantizer.finish_calibration()
    x = torch.randn(10, requires_grad=True)
    quantizer(x, track=True).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("estimator", ["moving_average", "min_max", "percentile"])
def test_compiled_tracking_is_eager_tracking(estimator: str) -> None:
    eager, other = (calibrated(torch.tensor([-1.0, 1.0]), estimator=estimator) for _ in range(2))
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        x = 3 * torch.randn(20)
        torch.testing.assert_close(compiled(x, track=True), eager(x, track=True))
        for quantizer in (other, eager):
            update_ranges([quantizer])
    assert torch.equal(other.get_ranges()["min_val"], eager.get_ranges()["min_val"])
    assert torch.equal(other.scale, eager.scale)
    torch._dynamo.reset()


def test_weights_are_quantized_once_per_version() -> None:
    quantizer, weight = WeightQuantizer(8, 0), torch.nn.Parameter(torch.randn(4, 5))
    with torch.no_grad():
        first = quantizer(weight)
        assert quantizer(weight) is first
        before = first.clone()
        weight.add_(torch.randn(4, 5))
        second = quantizer(weight)
        torch.testing.assert_close(second, fake_quantize_weight(weight, 8, 0))
    assert not torch.equal(second, before)
    trained = quantizer(weight)
    assert torch.equal(trained, second)
    trained.sum().backward()
    assert torch.equal(weight.grad, torch.ones(4, 5))
    integers, scale = quantizer.quantize(weight)
    assert integers.dtype == torch.int8
    torch.testing.assert_close(integers * scale, second)
    assert quantizer._kept is None  # no memory held through training
    with torch.no_grad():
        assert torch.equal(quantizer(weight), second)
    assert copy.deepcopy(quantizer)._kept is None
    assert pickle.loads(pickle.dumps(quantizer))._kept is None


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_weight_written_through_data_is_noticed(memory_format: torch.memory_format) -> None:
    # Averaging callbacks swap weights that way: the version stays.
    weight = torch.nn.Parameter(torch.randn(20, 8, 3, 3).to(memory_format=memory_format))
    quantizer = WeightQuantizer(8, 0)
    with torch.no_grad():
        quantizer(weight)
        weight.data.copy_(torch.randn(20, 8, 3, 3))
        torch.testing.assert_close(quantizer(weight), fake_quantize_weight(weight, 8, 0))
        weight.data = torch.randn(20, 8, 3, 3)
        torch.testing.assert_close(quantizer(weight), fake_quantize_weight(weight, 8, 0))


def test_a_weight_kept_under_inference_mode_can_be_trained_with() -> None:
    weight, quantizer = torch.nn.Parameter(torch.randn(4, 5)), WeightQuantizer(8, 0)
    with torch.inference_mode():
        quantizer(weight)
    x = torch.randn(3, 5, requires_grad=True)
    torch.nn.functional.linear(x, quantizer(weight)).sum().backward()
    assert x.grad is not None


def test_what_is_computed_from_parameters_is_never_kept() -> None:
    weight, quantizer = torch.nn.Parameter(torch.randn(4, 5)), WeightQuantizer(8, 0)
    for factor in (1.0, 2.0):
        with torch.no_grad():
            torch.testing.assert_close(quantizer(weight * factor), fake_quantize_weight(weight * factor, 8, 0))
    assert quantizer._kept is None


def test_print_tells_bits_and_range() -> None:
    text = repr(calibrated(torch.tensor([0.0, 2.55])))
    assert "num_bits=8, affine, range=[0, 2.55], scale=0.01, zero_point=0" in text
    assert "num_bits=4, axis=1" in repr(WeightQuantizer(4, 1))


def _rank(rank: int, folder: str, estimator: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    quantizers = [ActivationQuantizer(estimator=estimator) for _ in range(2)]
    for number, quantizer in enumerate(quantizers):
        quantizer.observe(torch.tensor([-1.0 - rank, 2.0 + rank + number]))
    sync_calibration(quantizers)
    statuses = [quantizer.finish_calibration() for quantizer in quantizers]
    quantizers[0](torch.tensor([-10.0 * rank, 5.0]), track=True)
    update_ranges(quantizers)
    torch.save({"ranges": [q.get_ranges() for q in quantizers], "statuses": statuses}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("estimator", "expected"), [("moving_average", (-1.5, 3.5)), ("min_max", (-2.0, 4.0))])
def test_ranges_agree_on_two_processes(estimator: str, expected: tuple[float, float], tmp_path: Path) -> None:
    mp.spawn(_rank, (str(tmp_path), estimator), nprocs=2)
    kept = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for one, other in zip(kept[0]["ranges"], kept[1]["ranges"], strict=True):
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)
    second = kept[0]["ranges"][1]
    assert (float(second["min_val"]), float(second["max_val"])) == pytest.approx(expected)
