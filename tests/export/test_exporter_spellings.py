"""Calls that PyTorch's exporter writes wrongly or not at all are right in the file; clamps of one limit run in INT8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_cco import CCOError, quantize
from lightning_cco.quantization.clamp_limits import LIMITS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Between(nn.Module):
    """A function between convolutions."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.last, self.function = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(self.function(self.first(x)))))


def by_batch(x: Tensor) -> Tensor:
    return F.batch_norm(x, torch.full((8,), 0.3), torch.full((8,), 2.0), torch.linspace(0.5, 2, 8), torch.linspace(-1, 1, 8), training=True)


CALLS = {
    "norm by the batch's statistics": by_batch,
    "norm without weights": lambda x: torch.relu(F.batch_norm(x, torch.zeros(8), torch.ones(8), None, None, True, 0.0, 1e-3)),
    "clamp_min": lambda x: torch.clamp_min(x, 0.5),
    "clamp_min_": lambda x: x.clamp_min_(min=-0.25),
    "clamp of an integer and a float": lambda x: torch.relu(x).clamp(0, 2.5),
}


@pytest.mark.parametrize("call", CALLS)
def test_it_is_right_and_in_int8(call: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    settings = {
        "global_quantization_settings": {"skip_tail_quantization": False},
        "layer_settings": [{"match": "clamp", "skip_quantization": True}] if "integer" in call else [],
    }
    quantized = quantize(Between(CALLS[call]).eval(), settings, (x,))
    quantized.calibrate([x])
    report = quantized.export(tmp_path / "a.onnx", dynamic_batch=False)
    assert report.integer_nodes["QLinearConv"] == 3
    assert report.sqnr_db > 45


@pytest.mark.parametrize(("name", "limit"), [("clamp_min", 0.5), ("clamp_min_", -1), ("clamp_max", 0.5), ("clamp_max_", 2)])
def test_limits_of_one_side_are_those_of_the_function(name: str, limit: float) -> None:
    x = torch.linspace(-3, 3, 61)
    expected = getattr(x.clone(), name)(limit)
    for args, kwargs in (((x, limit), {}), ((x,), {name.split("_")[1]: limit})):
        limits = LIMITS[name](args, kwargs)
        assert limits is not None
        assert torch.equal(x.clamp(*limits), expected)


class Narrow(nn.Module):
    """Converts what it is given to the type that its parameters have in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x.bfloat16())))


def test_a_conversion_of_the_models_own_is_named(tmp_path: Path) -> None:
    x = torch.randn(4, 8)
    quantized = quantize(Narrow().bfloat16().eval(), None, (x,))
    quantized.calibrate([x])
    with pytest.raises(CCOError, match=r"in module 'first'.*parameters are float32.*converts to a type of its own.*weight\.dtype"):
        quantized.export(tmp_path / "a.onnx")


class Masked(nn.Module):
    """A network that is told by integers which rows count."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(8, 8), nn.Linear(8, 4), function

    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)) + self.function(count)[:, None])


OF_INTEGERS: dict[str, Callable[[Tensor], Tensor]] = {
    "1.0 - mask": lambda n: (1.0 - n) * -3,
    "rsub": lambda n: torch.rsub(n, 0.5),
    "rsub with alpha": lambda n: torch.rsub(n, 0.5, alpha=2),
    "of a mask": lambda n: 1.5 - (n > 1).int(),
    "x // 1.5": lambda n: n // 1.5,
    "7.5 // x": lambda n: 7.5 // n,
    "floor_divide": lambda n: torch.floor_divide(n.float(), 2),
    "x // y": lambda n: (n * 3) // 2 - 0.5,
}


@pytest.mark.parametrize("call", OF_INTEGERS)
def test_floats_made_of_integers_are_right(call: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, count = torch.randn(4, 8), torch.tensor([1, 2, 3, 4])
    model = Masked(OF_INTEGERS[call]).eval()
    quantized = quantize(model, None, (x, count))
    quantized.calibrate([(x, count)])
    report = quantized.export(tmp_path / "a.onnx")
    assert report.sqnr_db > 45
    with torch.no_grad(), quantized.disabled():
        expected = model(x, count)
    session = ort.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": x.numpy(), "count": count.numpy()})
    assert (torch.as_tensor(got) - expected).abs().max() < 0.05 * expected.abs().max()
