"""Which estimator a tensor has by its bits: with mixed bits, through checkpoints and replanning, on several ranks, and up to the exported file."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_cco import CCOError, CCOWarning, QuantizedModel, quantize
from lightning_cco.quantization import range_updates
from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.range_updates import sync_calibration, update_ranges

MIXED = {
    "global_quantization_settings": {"weights_num_bits": 2, "activations_num_bits": 4},
    "layer_settings": [{"match": "conv", "weights_num_bits": 8}, {"match": "input_0", "activations_num_bits": 8}],
}


def network() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)), torch.randn(16, 1, 10, 10)


def calibrated(settings: Any = MIXED, x: Tensor | None = None) -> tuple[QuantizedModel, Tensor]:
    model, inputs = network()
    quantized = quantize(model, settings, (inputs,))
    quantized.calibrate([inputs if x is None else x])
    return quantized, inputs


def scales(quantized: QuantizedModel) -> dict[str, float]:
    return {key: float(one.scale) for key, one in quantized.activations.items()}


def train(quantized: QuantizedModel, x: Tensor) -> None:
    optimizer = torch.optim.SGD(quantized.model.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        quantized.model(x).square().sum().backward()
        optimizer.step()


def test_few_bits_clip_and_stand_still_and_8_bits_follow() -> None:
    quantized, x = calibrated()
    kinds = {key: (one.num_bits, one.estimator, one.settled) for key, one in quantized.activations.items()}
    assert kinds["input_0"] == (8, "moving_average", False)
    assert kinds["relu"] == (4, "mse", True)
    assert kinds["relu_1"] == (8, "moving_average", False)  # nothing but the pooling reads it
    assert {name: ones[0].estimator for name, ones in quantized.weights.items()} == {"conv": "minmax", "conv_1": "mse"}
    before = scales(quantized)
    train(quantized, 3 * x)
    after = scales(quantized)
    assert after["input_0"] > before["input_0"]
    assert after["relu"] == before["relu"]
    quantized.unfreeze_ranges()
    train(quantized, 3 * x)
    assert scales(quantized)["relu"] > before["relu"]


@pytest.mark.parametrize("estimator", ["moving_average", "min_max", "percentile", "mse"])
@pytest.mark.parametrize("of_weights", ["minmax", "mse"])
def test_what_is_said_wins(estimator: str, of_weights: str) -> None:
    said = {"training_settings": {"range_estimator": estimator, "weight_estimator": of_weights}}
    quantized, x = calibrated({**MIXED, **said})
    assert {one.estimator for one in quantized.activations.values()} == {estimator}
    assert {ones[0].estimator for ones in quantized.weights.values()} == {of_weights}
    before = scales(quantized)
    train(quantized, 3 * x)
    assert scales(quantized)["relu"] > before["relu"]


def test_8_bits_are_as_they_were() -> None:
    results = []
    for said in ({}, {"training_settings": {"range_estimator": "moving_average", "weight_estimator": "minmax"}}):
        quantized, x = calibrated(said)
        train(quantized, 2 * x)
        results.append([*quantized.model.parameters(), *(one.scale for one in quantized.activations.values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_range_of_zeros_follows_until_it_is_calibrated() -> None:
    """It would be frozen at the first values that come, which for an adapter that begins at 0 are tiny."""
    with pytest.warns(CCOWarning, match="nothing but zeros came"):
        quantized, x = calibrated(x=torch.zeros(4, 1, 10, 10) + 0.0)
    with torch.no_grad():
        for layer in quantized.model[::2][:2]:
            layer.bias.zero_()  # type: ignore[union-attr]
    quantized.calibrate([x])
    assert quantized.activations["relu"].settled


def test_an_empty_range_takes_the_first_values_and_goes_on_following() -> None:
    quantizer = ActivationQuantizer(4, estimator="auto")
    quantizer.observe(torch.zeros(3))
    quantizer.finish_calibration()
    for factor in (1e-3, 1.0, 1.0, 1.0):
        quantizer(factor * torch.tensor([-1.0, 3.0]), track=True)
        update_ranges([quantizer])
    assert not quantizer.settled
    assert float(quantizer.max_val) > 0.1


def test_checkpoints_keep_what_stands_still() -> None:
    quantized, x = calibrated()
    state = quantized.state_dict()
    other = quantize(network()[0], MIXED, (x,))
    assert other.load_state_dict(state) == []
    before = scales(other)
    assert before == scales(quantized)
    train(other, 3 * x)
    assert scales(other)["relu"] == before["relu"]
    state["version"] = 1
    for ranges in state["ranges"].values():  # of a version whose ranges followed
        del ranges["settled"]
    other.load_state_dict(state)
    train(other, 3 * x)
    assert scales(other)["relu"] != before["relu"]
    state["ranges"]["relu"]["settled"] = "no"
    with pytest.raises(CCOError, match=r"quantized.ranges.relu.settled'?: expected true or false"):
        other.load_state_dict(state)


def test_another_estimator_is_planned_anew_and_the_same_is_kept() -> None:
    quantized, _ = calibrated()
    assert quantized.replan(quantized.settings) == []
    settings = quantized.settings
    settings.training_settings.range_estimator, settings.training_settings.weight_estimator = "mse", "minmax"
    assert "relu" in quantized.replan(settings)
    assert quantized.weights["conv_1"][0].estimator == "minmax"


def test_ranks_agree_on_ranges_of_different_estimators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks as two threads; each reduction waits for both."""
    barrier, given = threading.Barrier(2, timeout=20), {}

    def all_reduce(tensor: Tensor, op: Any = torch.distributed.ReduceOp.SUM) -> None:
        given[threading.get_ident()] = tensor.clone()
        barrier.wait()
        both = torch.stack(list(given.values()))
        result = both.amax(0) if op == torch.distributed.ReduceOp.MAX else both.sum(0)
        barrier.wait()
        tensor.copy_(result)

    monkeypatch.setattr(range_updates, "world_size", lambda: 2)
    monkeypatch.setattr(range_updates.dist, "all_reduce", all_reduce)
    values = [
        torch.cat([torch.linspace(-1, 1, 400), torch.tensor([-5.0, 4.0])]),
        torch.cat([torch.linspace(-2, 3, 400), torch.tensor([9.0])]),
    ]
    found: list[list[ActivationQuantizer]] = [[], []]

    def rank(number: int) -> None:
        quantizers = [ActivationQuantizer(bits, estimator="auto") for bits in (8, 4, 8, 2)]
        for one in quantizers:
            one.observe(values[number])
        errors = sync_calibration(quantizers)
        assert errors is not None
        assert [error is None for error in errors] == [True, False, True, False]
        for one, error in zip(quantizers, errors, strict=True):
            one.finish_calibration(error)
        found[number] = quantizers

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.scale, other.scale)
    assert (float(found[0][0].min_val), float(found[0][0].max_val)) == (-3.5, 6.5)  # the mean of the ranks' ends
    together = ActivationQuantizer(2, estimator="mse")
    for batch in values:
        together.observe(batch)
    together.finish_calibration()
    assert torch.equal(found[0][3].scale, together.scale)


def test_the_file_stores_the_scales_of_the_training(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    import onnx
    from onnx import numpy_helper

    quantized, x = calibrated()
    report = quantized.export(tmp_path / "model.onnx", (x,))
    assert report.sqnr_db > 25
    stored = [numpy_helper.to_array(entry) for entry in onnx.load(tmp_path / "model.onnx").graph.initializer]
    expected = quantized.weights["conv_1"][0].scale(quantized.model[2].weight).flatten().numpy()  # type: ignore[arg-type]
    # The same values on a finer grid: a whole number of stored steps is one of the training's.
    steps = [expected / array for array in stored if array.shape == expected.shape and array.dtype == expected.dtype and (array > 0).all()]
    assert any(abs(step - round(float(step[0]))).max() < 1e-4 and 1 <= round(float(step[0])) <= 64 for step in steps)
