"""A file is run in the engine that it is for: what that refuses or computes otherwise is an error that names the layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_case import run
from export_models import ViT, settled
from torch import Tensor, nn

from lightning_cco import CCOError, CCOWarning, QuantizedModel, quantize
from lightning_cco.export import check
from lightning_cco.export.engines import ENGINES, Computed, FileFeature

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


def settings(target: str) -> dict[str, Any]:
    return {
        "global_quantization_settings": {"skip_tail_quantization": False},
        "deployment_settings": {"target_framework": target, "vnni": False},
    }


class Bag(nn.Module):
    def __init__(self, mode: str, padding: int | None = None, last: bool = False) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 8, mode=mode, padding_idx=padding, include_last_offset=last)
        self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor, offsets: Tensor | None = None) -> Tensor:
        return self.head(torch.relu(self.hidden(self.bag(ids, offsets))))


class Largest(nn.Module):
    """A maximum over the tokens, which OpenVINO 2026.4 rounds wrongly as a ReduceMax."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.table(ids).amax(1))))


@pytest.mark.parametrize(
    ("mode", "padding", "offsets", "last"),
    [("mean", None, None, False), ("mean", 3, [0, 2, 2, 6], False), ("max", 3, None, False), ("max", None, [0, 2, 2, 6, 9], True)],
)
def test_bags_load_in_openvino(mode: str, padding: int | None, offsets: list[int] | None, last: bool, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    inputs = (torch.randint(0, 20, (9,)), torch.tensor(offsets)) if offsets else (torch.randint(0, 20, (4, 5)),)
    quantized = quantize(Bag(mode, padding, last).eval(), settings("openvino"), inputs)
    quantized.calibrate([inputs])
    report = quantized.export(tmp_path / "bag.onnx")
    assert report.target_sqnr_db > 40
    # With AVX-512 it puts linear layers in a row into one node, if the number of rows is fixed.
    assert report.target_nodes in ({"FullyConnected": 2}, {"Subgraph": 1})
    with torch.no_grad():
        np.testing.assert_allclose(run(tmp_path / "bag.onnx", *inputs, optimize=False), quantized.model(*inputs).numpy(), atol=1e-2)


def test_a_layer_that_the_target_computes_otherwise_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the operator for a maximum that OpenVINO computes rightly."""
    pytest.importorskip("openvino")
    wants = tuple(entry for entry in ENGINES["openvino"].requirements if entry.feature is not FileFeature.SORTED_MAXIMA)
    monkeypatch.setattr("lightning_cco.export.stored_tensors.ENGINES", {"openvino": replace(ENGINES["openvino"], requirements=wants)})
    ids = torch.randint(0, 20, (4, 5))
    quantized = quantize(Largest().eval(), settings("openvino"), (ids,))
    quantized.calibrate([ids])
    with pytest.raises(CCOError, match=r"in OpenVINO .*'amax'"):
        quantized.export(tmp_path / "largest.onnx")
    assert not (tmp_path / "largest.onnx").exists()


class Failing:
    """An engine that does not know an operator."""

    def __init__(self, path: Path) -> None:
        raise RuntimeError("Check failed: while validating ONNX node '<Node(Conv): conv2d>': unsupported")


def test_a_file_that_the_target_can_not_load_is_refused_with_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = replace(ENGINES["openvino"], load=Failing, package="numpy")
    monkeypatch.setattr("lightning_cco.export.stored_tensors.ENGINES", {"openvino": engine})
    x = torch.randn(2, 3, 8, 8)
    quantized = quantize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval(), settings("openvino"), (x,))
    quantized.calibrate([x])
    with pytest.raises(CCOError, match=r"can't run the file at layer 'conv'"):
        quantized.export(tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


class Slow:
    """An engine that computes everything in float."""

    def __init__(self, path: Path) -> None:
        self.compiled = ENGINES["openvino"].load(path)  # type: ignore[misc]

    def run(self, feeds: Any) -> Any:
        return self.compiled.run(feeds)

    def computed(self) -> list[Computed]:
        return [replace(node, precision="f32") for node in self.compiled.computed()]


class Beside(nn.Module):
    """Operators that multiply no weights, between convolutions: some with an INT8 form in OpenVINO, and some without."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(24, 4, 1)])
        self.table, self.shift = nn.Parameter(torch.rand(8, 8, 8)), nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third, last = self.convs
        a = torch.relu(first(x))
        b = torch.relu(second(a))
        c = torch.relu(third(a / (b + self.table)))
        return last(torch.nn.functional.avg_pool2d(torch.cat([a + b, a * b, c + self.shift], 1), 2))


def beside() -> QuantizedModel:
    x = torch.randn(2, 3, 8, 8)
    quantized = quantize(Beside().eval(), settings("openvino"), (x,))
    assert {"add_1", "mul", "add_2", "concat", "avg_pool"} <= quantized.plan.quantized
    quantized.calibrate([x])
    return quantized


def test_planned_layers_of_any_kind_in_float_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr("lightning_cco.export.stored_tensors.ENGINES", {"openvino": replace(ENGINES["openvino"], load=Slow)})
    monkeypatch.setattr("lightning_cco.export.onnx_file.check_file", check.check_file)  # this test wants what no other may have
    quantized = beside()
    with pytest.warns(CCOWarning, match=r"OpenVINO .* computes in float: 'conv', 'conv_1'"):
        report = quantized.export(tmp_path / "model.onnx")
    assert report.target_nodes == {}
    named = {layer for island in report.float_islands if island.unplanned for layer in island.layers}
    assert {"conv", "conv_3", "mul", "concat", "avg_pool"} <= named <= quantized.plan.quantized


def test_what_openvino_computes_in_float_is_planned_so(tmp_path: Path) -> None:
    """That nothing which is planned in INT8 runs in float, is asserted for each export of the tests."""
    pytest.importorskip("openvino")
    quantized = beside()
    assert {"add", "div"} <= quantized.plan.skipped.keys()  # of a parameter that has more values than channels, and a division
    report = quantized.export(tmp_path / "model.onnx")
    assert (report.target_nodes["Convolution"], report.target_nodes["Concatenation"], report.target_nodes["Pooling"]) == (4, 1, 1)
    assert report.target_floats["Eltwise"] >= 1


@pytest.mark.parametrize("fixed", [False, True])
def test_a_fixed_batch_costs_no_integer_operator(fixed: bool, tmp_path: Path) -> None:
    x = torch.randn(1, 3, 32, 32)
    quantized = quantize(settled(ViT(24, 2, 2, 32, 8, 10)), None, (x,))
    quantized.calibrate([x])
    report = quantized.export(tmp_path / "vit.onnx", dynamic_batch=not fixed)
    assert report.integer_nodes["MatMulIntegerToFloat"] == 12
    assert not [island for island in report.float_islands if island.unplanned]
