"""An export checks its own file, says what it saw, refuses what differs, and leaves nothing half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_case import MODELS, calibrated
from models import GuideCNN, ResidualCNN
from torch import Tensor, nn

from lightning_cco import CCOError, quantize
from lightning_cco.export import check
from lightning_cco.export.outputs import Outputs

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


def test_the_report_says_how_far_each_tensor_is_and_what_runs_where(tmp_path: Path) -> None:
    quantized, x = calibrated(ResidualCNN(), ResidualCNN.example)
    report = quantized.export(tmp_path / "model.onnx", batches=[(x,), (x[:1],), (ResidualCNN.example(),)])
    assert report.batches == 3
    assert [entry.layer for entry in report.layers] == list(quantized.plan.tensors)
    assert 0 <= report.mean_steps < 0.5
    assert report.largest_steps == max(entry.largest_steps for entry in report.layers)
    assert 0 < report.mean_difference < report.largest_difference
    assert 0.5 < report.agreement <= 1.0
    assert 0 < report.largest_steps < 3
    assert report.size_bytes == (tmp_path / "model.onnx").stat().st_size
    assert report.integer_nodes == {"QLinearConv": 5, "QLinearAdd": 2, "QLinearGlobalAveragePool": 1}
    assert [(island.operator, island.layers) for island in report.float_islands] == [("Gemm", ("linear",))]
    assert report.float_islands[0].reason.startswith("tail")
    text = str(report)
    assert "linear (Gemm): tail: the last layer with weights before an output, or after it" in text
    assert f"SQNR {report.sqnr_db:.1f} dB" in text
    report.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["float_islands"][0]["layers"] == ["linear"]
    assert saved["largest_steps"] == report.largest_steps


def test_float_islands_name_the_layers_that_the_engine_has_no_int8_kernel_of(tmp_path: Path) -> None:
    for name, operator, layer in (("lstm", "LSTM", "lstm"), ("unet", "ConvTranspose", "conv_transpose")):
        make, example, _ = MODELS[name]
        quantized, _ = calibrated(make(), example)
        islands = {island.operator: island for island in quantized.export(tmp_path / f"{name}.onnx").float_islands}
        assert islands[operator].layers == (layer,)
        assert "computes it in float" in islands[operator].reason


def test_batches_of_another_size_than_the_file_takes_are_left_out(tmp_path: Path) -> None:
    quantized, x = calibrated(ResidualCNN(), ResidualCNN.example)
    assert quantized.export(tmp_path / "model.onnx", batches=[(x,), (x[..., :-2],)], dynamic_sizes=False).batches == 1


def break_scale(model: onnx.ModelProto, convolution: onnx.NodeProto) -> None:
    change(model, convolution, 1, lambda array: 3 * array)


def break_weight(model: onnx.ModelProto, convolution: onnx.NodeProto) -> None:
    change(model, convolution, 0, lambda array: np.roll(array, 1, axis=2))


def change(model: onnx.ModelProto, convolution: onnx.NodeProto, number: int, how: Callable[[Any], Any]) -> None:
    maker = next(node for node in model.graph.node if node.output[0] == convolution.input[1])
    entry = next(entry for entry in model.graph.initializer if entry.name == maker.input[number])
    entry.CopyFrom(onnx.numpy_helper.from_array(how(onnx.numpy_helper.to_array(entry)), entry.name))


@pytest.mark.parametrize("harm", [break_scale, break_weight])
@pytest.mark.parametrize(("which", "named"), [(0, "relu"), (2, "batch_norm_2"), pytest.param(4, "batch_norm_4", marks=pytest.mark.slow)])
def test_a_file_that_differs_is_refused_and_the_first_layer_that_does_is_named(
    which: int, named: str, harm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized, _ = calibrated(ResidualCNN(), ResidualCNN.example)

    def harmed(model: Any, path: Path, *others: Any) -> None:
        written = onnx.load(path)
        harm(written, [node for node in written.graph.node if node.op_type == "Conv"][which])
        onnx.save(written, path)
        check.check_file(model, path, *others)

    monkeypatch.setattr("lightning_cco.export.onnx_file.check_file", harmed)
    with pytest.raises(CCOError, match=rf"differs from the fake-quantized model: .*; the first layer that differs is '{named}'"):
        quantized.export(tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_outputs_of_another_shape_are_refused() -> None:
    with pytest.raises(CCOError, match="shapes"):
        Outputs(["output"], [None]).add([np.zeros((2, 3))], [np.zeros((3, 2))], [], [])
    with pytest.raises(CCOError, match="shapes"):
        Outputs(["output"], [None]).add([np.zeros(2), np.zeros(2)], [np.zeros(2)], [], [])


def test_what_can_not_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = GuideCNN().eval(), GuideCNN.example()
    quantized = quantize(model, None, (x,))
    with pytest.raises(CCOError, match="never calibrated"):
        quantized.export(tmp_path / "model.onnx")
    quantized.calibrate([(x,)])
    (tmp_path / "file").write_text("")
    with pytest.raises(CCOError, match="can't be written"):
        quantized.export(tmp_path / "file" / "model.onnx")
    quantized.example = ((), None)
    with pytest.raises(CCOError, match="example_args"):
        quantized.export(tmp_path / "model.onnx")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CCOError, match=r"pip install 'lightning-cco\[export\]'"):
        quantized.export(tmp_path / "model.onnx")


def test_a_model_that_can_not_be_traced(tmp_path: Path) -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            return self.out(x if x.sum() > 0 else -x)

    quantized, _ = calibrated(Stubborn(), lambda: torch.ones(3, 4))
    with pytest.raises(CCOError, match="Stubborn can't be traced"):
        quantized.export(tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    quantized, _ = calibrated(GuideCNN(), GuideCNN.example)
    tmp_path.chmod(0o500)
    with pytest.raises(CCOError, match="can't be written"):
        quantized.export(tmp_path / "model.onnx")


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class Between(nn.Module):
    """Two linear layers with something in between, and a head."""

    def __init__(self, what: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.what, self.before, self.behind, self.head = what, nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.behind(self.what(self.before(x))))


@pytest.mark.parametrize("what", [Squared.apply, lambda x: torch.fft.fft(x).real], ids=["autograd function", "complex"])
def test_what_stays_in_float_is_exported_in_float(what: Any, tmp_path: Path) -> None:
    quantized, _ = calibrated(Between(what), lambda: torch.randn(3, 4))
    assert quantized.export(tmp_path / "model.onnx").sqnr_db > 40


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (lambda x: x * float(x.max()), r"can't be traced .*after layer '\w+'"),
        (torch.special.bessel_j0, r"uses \S*bessel_j0, which ONNX has no operator for.*\.pt2"),
    ],
    ids=["control flow", "no operator"],
)
def test_what_can_not_be_written_is_named(what: Any, said: str, tmp_path: Path) -> None:
    quantized, x = calibrated(Between(what), lambda: torch.rand(3, 4))
    before = quantized.model(x)
    with pytest.raises(CCOError, match=said):
        quantized.export(tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(quantized.model(x), before)


def test_an_old_file_stays_when_the_new_one_is_refused(tmp_path: Path) -> None:
    quantized, _ = calibrated(ResidualCNN(), ResidualCNN.example)
    quantized.export(tmp_path / "model.onnx")
    before = (tmp_path / "model.onnx").read_bytes()
    with pytest.raises(CCOError, match="differs"):
        quantized.export(tmp_path / "model.onnx", min_sqnr_db=200)
    assert (tmp_path / "model.onnx").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
