"""One batch of other values ruins the ranges of all: it is named; batches that differ as usual are not."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_cco import CCOError, CCOWarning, QuantizedModel, quantize


def made(settings: object = None) -> QuantizedModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    return quantize(model, settings, (torch.randn(4, 8),))


@pytest.mark.parametrize("estimator", ["moving_average", "min_max", "percentile", "mse"])
def test_a_batch_that_ruins_the_ranges_is_named(estimator: str) -> None:
    quantized = made({"training_settings": {"range_estimator": estimator}})
    batches = [torch.randn(32, 8) for _ in range(5)]
    batches[2][7] *= 1000
    with pytest.warns(CCOWarning, match=r"batch 3 has made the range of 'input_0', 'relu', .*'input_0': .* of 255 levels"):
        quantized.calibrate(batches)
    usual = batches[0]
    with torch.no_grad(), quantized.disabled():
        expected = quantized.model(usual)
    with torch.no_grad():
        found = quantized.model(usual)
    assert float((found - expected).norm() / expected.norm()) > 0.1  # what is warned of
    batches.pop(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized.calibrate(batches)


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param(lambda number: torch.randn(32, 8), id="alike"),
        pytest.param(lambda number: torch.randn(1, 8), id="single samples"),
        pytest.param(lambda number: torch.randn(8, 8) * torch.randn(8, 1).exp(), id="log-normal loudness"),
        pytest.param(lambda number: torch.randn(32, 8) * (torch.rand(32, 8) < 0.01), id="sparse"),
        pytest.param(lambda number: torch.randn(32, 8) * (number % 2 == 0), id="zeros in every second batch"),
        pytest.param(
            lambda number: torch.randn(32, 8) * (1000.0 if number == 1 else 1.0) if number < 2 else torch.randn(0, 8), id="too few to tell"
        ),
    ],
)
def test_usual_batches_are_not(batch: Callable[[int], Tensor]) -> None:
    quantized = made()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized.calibrate([batch(number) for number in range(20)])


def test_a_range_beyond_float32_is_refused() -> None:
    quantized = made()
    with pytest.raises(CCOError, match=r"'input_0' .*NaN or infinite"):
        quantized.calibrate([torch.full((4, 8), 3e38) * torch.tensor([1.0, -1.0] * 4)])
