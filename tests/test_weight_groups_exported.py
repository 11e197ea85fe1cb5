"""Files with weights in groups: what ONNX Runtime and OpenVINO make of them, their sizes, and what is said of them."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from test_weight_groups import GROUPS, IDS, Decoder
from torch import Tensor, nn

from lightning_cco import CCOError, CCOWarning, QuantizedModel, quantize
from lightning_cco.export import weight_blocks
from lightning_cco.export.report import ExportReport
from lightning_cco.export.weight_blocks import Block

ALONE = GROUPS | {"weight_only": True}
needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")


class Forms(nn.Module):
    """Linear layers on rows, on images of rows, without a bias, by keyword, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(64, 128), nn.Linear(128, 128), nn.Linear(128, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x))
        x = x + self.again(self.again(x).tanh())
        return F.linear(input=x.unsqueeze(1).unsqueeze(1), weight=self.last.weight).flatten(1)


def exported(
    model: nn.Module, x: Tensor, path: Path, recipe: dict[str, Any] | None = None, **options: Any
) -> tuple[QuantizedModel, ExportReport]:
    torch.manual_seed(0)
    quantized = quantize(model, {"global_quantization_settings": ALONE} | (recipe or {}), (x,))
    quantized.calibrate([x])
    report = quantized.export(path, **options)
    assert isinstance(report, ExportReport)
    return quantized, report


def in_float(path: Path, x: Tensor) -> np.ndarray:
    """The file, each operator as it stands there, products in float."""
    model = onnx.load(path)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def integers(path: Path) -> Counter[str]:
    """How many bytes a file holds of constants of each type but float."""
    types = onnx.TensorProto.DataType
    found: Counter[str] = Counter()
    for entry in onnx.load(path).graph.initializer:
        if entry.data_type not in (types.FLOAT, types.INT64):
            found[types.Name(entry.data_type)] += len(entry.raw_data)
    return found


@pytest.mark.parametrize(("bits", "group"), [(2, 16), (4, 64), (8, 32)])
def test_onnx_runtime_multiplies_every_one(bits: int, group: int, tmp_path: Path) -> None:
    model, settings = Decoder(), ALONE | {"weights_num_bits": bits, "weights_group_size": group}
    _, report = exported(model, IDS, tmp_path / "a.onnx", {"global_quantization_settings": settings})
    assert report.integer_nodes == {"MatMulNBits": 4, "GatherBlockQuantized": 1}
    assert (report.in_groups, report.as_floats) == (5, [])
    assert report.sqnr_db > 38  # it rounds what products read
    assert report.local_difference < 1e-4  # and in float the file is the model
    assert not report.as_floats
    with torch.no_grad():
        assert np.allclose(in_float(tmp_path / "a.onnx", IDS), model(IDS).numpy(), rtol=1e-3, atol=1e-3)
    assert "weights in blocks   multiplied or looked up as they are in 5 of 5 layers" in str(report)
    assert "MatMulNBits" in " ".join(report.notes)


def test_integers_take_half_a_byte_and_a_tied_table_is_stored_once(tmp_path: Path) -> None:
    exported(Decoder(), IDS, tmp_path / "a.onnx")
    stored = integers(tmp_path / "a.onnx")
    assert stored["INT4"] == (64 * 256 + 256 * 64 + 64 * 64) // 2
    table, conv, points = 48 * 64 // 2, 64 * 64, 64
    assert stored["UINT8"] + stored["INT8"] in (table + conv, table + conv + points)
    exported(Decoder(), IDS, tmp_path / "b.onnx", {"global_quantization_settings": ALONE | {"weights_num_bits": 8}})
    assert sum(integers(tmp_path / "b.onnx").values()) >= 2 * 64 * 256 + 64 * 64 + 48 * 64 + conv


@pytest.mark.parametrize("shape", [(6, 64), (2, 5, 64)], ids=str)
def test_every_form_of_a_linear_layer(shape: tuple[int, ...], tmp_path: Path) -> None:
    x, model = torch.randn(shape), Forms()
    _, report = exported(model, x, tmp_path / "a.onnx")
    assert report.integer_nodes == {"MatMulNBits": 4}
    assert not report.as_floats
    more = torch.randn(3, *shape[1:])
    with torch.no_grad():
        assert np.allclose(in_float(tmp_path / "a.onnx", more), model(more).numpy(), rtol=1e-4, atol=1e-4)
    assert sum(integers(tmp_path / "a.onnx").values()) == (64 * 128 + 128 * 128 + 128 * 64) // 2  # what is called twice is there once


def test_beside_layers_in_int8(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )
    quantized, report = exported(model, torch.randn(4, 3, 8, 8), tmp_path / "a.onnx", {"global_quantization_settings": GROUPS})
    assert quantized.plan.quantized >= {"conv", "conv_1"}
    assert report.integer_nodes["QLinearConv"] == report.integer_nodes["MatMulNBits"] == 2
    assert not report.as_floats
    assert report.mean_steps < 0.1


def test_embedding_bags(tmp_path: Path) -> None:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(30, 32, mode="mean"), nn.Linear(32, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.bag(ids).relu())

    model, ids = Bags(), torch.randint(0, 30, (4, 6))
    exported(model, ids, tmp_path / "a.onnx")
    with torch.no_grad():
        assert np.allclose(in_float(tmp_path / "a.onnx", ids), model(ids).numpy(), rtol=1e-4, atol=1e-4)


@needs_openvino
@pytest.mark.parametrize(("bits", "kind"), [(4, "i4"), (8, "i8")])
def test_openvino_multiplies_integers_as_they_are(bits: int, kind: str, tmp_path: Path) -> None:
    recipe = {"global_quantization_settings": ALONE | {"weights_num_bits": bits}, "deployment_settings": {"target_framework": "openvino"}}
    _, report = exported(Decoder(), IDS, tmp_path / "a.onnx", recipe)
    assert report.target_nodes == {f"FullyConnected with weights in {kind}": 4}
    assert report.target_sqnr_db > 80
    assert (report.in_groups, report.as_floats) == (4, [])
    assert not any("MatMulNBits" in note or "overflow" in note for note in report.notes)


def test_what_can_not_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CCOError, match=r"target_framework: tensorrt, which was not tried with weights in groups\. Leave weights_group_size out"
    ):
        exported(Decoder(), IDS, tmp_path / "a.onnx", {"deployment_settings": {"target_framework": "tensorrt"}})
    with pytest.raises(CCOError, match=r"opset_version=20 can't be written with weights in 4 bits or in groups"):
        exported(Decoder(), IDS, tmp_path / "a.onnx", opset_version=20)


@pytest.mark.parametrize(("layer", "part"), [("addmm", "scale"), ("embedding", "integers")])
def test_wrong_values_are_found(layer: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = weight_blocks.blocks_of

    def damaged(*args: Any) -> dict[str, Block]:
        found = original(*args)
        block = found[layer]
        if part == "scale":
            block.scale[1, 1] *= 1.2
            block.matrix[1][1, 1] *= 1.2
        elif block.packed is not None:
            block.packed[3, 5] ^= 1
        else:
            block.matrix[0][5, 3] ^= 1
        return found

    monkeypatch.setattr("lightning_cco.export.stored_tensors.blocks_of", damaged)
    tied = layer in ("embedding", "matmul_1")  # one table
    with pytest.raises(CCOError, match="layer '(embedding|matmul_1)'" if tied else f"layer '{layer}'"):
        exported(Decoder(), IDS, tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()


def test_weights_that_become_floats_in_every_run_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def transposed(write: Any, block: Block) -> Tensor:
        attributes = {"axis": 1, "block_size": block.group}
        return write("DequantizeLinear", (block.integers, block.scale), block.integers.shape, torch.float32, attributes).t()

    monkeypatch.setattr(weight_blocks, "dequantized", transposed)
    with pytest.warns(CCOWarning, match=r"ONNX Runtime makes floats of the weights in groups of 'linear', 'addmm', 'matmul' in every run"):
        _, report = exported(Decoder(), IDS, tmp_path / "a.onnx")
    assert report.as_floats == ["linear", "addmm", "matmul"]


def test_a_tied_table_with_a_scale_for_each_row_is_stored_once(tmp_path: Path) -> None:
    settings = {"weight_only": True, "skip_tail_quantization": False}
    model = Decoder()
    _, report = exported(model, IDS, tmp_path / "a.onnx", {"global_quantization_settings": settings})
    assert report.integer_nodes == {"MatMulNBits": 4, "GatherBlockQuantized": 1}
    assert sum(integers(tmp_path / "a.onnx").values()) < 2 * 64 * 256 + 64 * 64 + 48 * 64 + 64 * 64 + 700  # and zero points
    with torch.no_grad():
        assert np.allclose(in_float(tmp_path / "a.onnx", IDS), model(IDS).numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_module_is_checked_as_it_is_without(dynamic: bool, tmp_path: Path) -> None:
    model = Decoder()
    model.compile(backend="aot_eager")
    overall = ALONE | {"activations_dynamic": dynamic}
    _, report = exported(model, IDS, tmp_path / "a.onnx", {"global_quantization_settings": overall})
    assert report.integer_nodes == {"MatMulNBits": 4, "GatherBlockQuantized": 1}
    assert len(report.layers) == (4 if dynamic else 0)
    assert report.faults == {}
