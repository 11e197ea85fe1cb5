"""A file whose batch varies is compared with its model at other sizes of the batch: what it does not hold for is fixed, or said."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import CCOError, CCOWarning, QuantizedModel, quantize
from lightning_cco.export.batch_check import other_batches
from lightning_cco.export.dynamic_sizes import ExportAttempts
from lightning_cco.export.errors import SizesDoNotVary, VaryingSizesCost

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


class Net(nn.Module):
    """Two layers, and between or behind them what depends on the size of the batch."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.first, self.last = what, nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        x, count = F.relu(self.first(x)), x.shape[0]
        if self.what == "statistics":
            x = (x - x.mean(0)) / (x.std(0) + 1)
        elif (self.what == "odd" and count % 2) or (self.what == "alone" and count == 1):
            x = x * 2
        elif self.what == "large" and count > 6:
            x = x.flip(-1)
        elif self.what == "twos":
            x = x.view(-1, 2, 8).mean(1)
        x = self.last(x)
        if self.what == "parts":
            first, *rest = x.split(count // 2)
            return [first, *rest]
        return F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).t() if self.what == "similarities" else x


def calibrated(what: str) -> QuantizedModel:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    quantized = quantize(Net(what).eval(), {"global_quantization_settings": {"skip_tail_quantization": False}}, (x,))
    quantized.calibrate([x])
    return quantized


@pytest.mark.parametrize(
    ("what", "said"), [("parts", "with a batch of 5.* gave '2'"), ("odd", "with a batch of 5.* calls other operations .*mul")]
)
def test_a_batch_at_which_the_model_gives_something_else_is_fixed(what: str, said: str, tmp_path: Path) -> None:
    quantized = calibrated(what)
    with pytest.raises(CCOError, match=f"{said}.*dynamic_batch=False"):
        quantized.export(tmp_path / "a.onnx", dynamic_batch=True)
    assert not list(tmp_path.iterdir())
    with pytest.warns(CCOWarning, match=f"fixed in the file, at 4 as in the example.*{said}"):
        report = quantized.export(tmp_path / "a.onnx")
    assert report.inputs == {"x": [4, 8]}


@pytest.mark.parametrize("quantized_operators", [False, True])
def test_a_program_gives_as_many_outputs_as_its_model(quantized_operators: bool, tmp_path: Path) -> None:
    quantized = calibrated("parts")
    with pytest.raises(CCOError, match=r"with a batch of 5.* gave '2' .*dynamic_batch=False"):
        quantized.export(tmp_path / "a.pt2", dynamic_batch=True, pt2e=quantized_operators)
    with pytest.warns(CCOWarning, match="fixed in the file, at 4"):
        program = quantized.export(tmp_path / "a.pt2", pt2e=quantized_operators)
    assert len(program.module()(torch.randn(4, 8))) == 2


@pytest.mark.parametrize(("what", "limit"), [("large", "axis 0 of 'x' 6 at most"), ("alone", "2 samples at least, .*mul")])
def test_batches_that_a_file_is_not_for_are_said(what: str, limit: str, tmp_path: Path) -> None:
    with pytest.warns(CCOWarning, match=f"within these limits alone.*{limit}"):
        report = calibrated(what).export(tmp_path / "a.onnx")
    assert report.inputs == {"x": ["batch", 8]}
    assert len(report.batch_limits) == 1


@pytest.mark.parametrize("what", ["statistics", "similarities", "twos"])
def test_samples_that_are_mixed_are_compared_with_the_model_at_that_batch(what: str, tmp_path: Path) -> None:
    quantized = calibrated(what)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CCOWarning)
        report = quantized.export(tmp_path / "a.onnx")
    assert report.inputs == {"x": ["batch", 8]}
    x = torch.randn(10, 8)
    with torch.no_grad():
        expected = quantized.model(x)
    [found] = ort.InferenceSession(str(tmp_path / "a.onnx")).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=0.05, rtol=0)


def test_every_axis_of_the_batch_has_the_other_size() -> None:
    x, mask, table, states = torch.arange(4.0).view(4, 1), torch.ones(4, 4), torch.ones(5, 2), torch.ones(1, 8, 3)
    shapes = [["batch", 1], ["batch", "batch"], [5, 2], [1, "2*batch", 3]]
    found = list(other_batches((x, mask, table, states), shapes))
    assert [other.size for other in found] == [5, 8, 3, 2]
    assert [list(tensor.shape) for tensor in found[0].tensors] == [[5, 1], [5, 5], [5, 2], [1, 10, 3]]
    assert found[0].tensors[0].flatten().tolist() == [0, 1, 2, 3, 0]
    assert [other.size for other in other_batches((x[:1],), [["batch", 1]])] == [3, 2]
    assert list(other_batches((x,), [[4, 1]])) == []


def test_only_sizes_that_could_vary_are_said_to() -> None:
    for error, could in ((SizesDoNotVary("can't be traced"), False), (VaryingSizesCost("it is slower"), True)):
        ways = ExportAttempts({(0, 2): "height"}, None, False, (torch.ones(1, 3, 8, 8),))
        ways.next()
        ways.failed(error)
        assert ("dynamic_sizes=True lets them vary" in ways.why) is could
