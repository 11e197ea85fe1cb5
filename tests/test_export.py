"""An exported file runs in INT8 and gives what the fake-quantized model gives, for each kind of model and engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from export_case import MODELS, calibrated, run
from models import ResidualCNN

from lightning_cco import quantize

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


@pytest.mark.parametrize("name", MODELS)
def test_the_file_agrees_with_fake_quantization_at_any_batch_size(name: str, tmp_path: Path) -> None:
    make, example, integer = MODELS[name]
    quantized, _ = calibrated(make(), example)
    report = quantized.export(tmp_path / "model.onnx")
    assert report.sqnr_db > 20
    assert sum(report.integer_nodes.values()) >= integer
    other = example()[:3]
    with torch.no_grad():
        expected = quantized.model(other).numpy()
    got = run(tmp_path / "model.onnx", other)
    assert got.shape == expected.shape
    assert np.square(got - expected).sum() < 0.01 * np.square(expected).sum()
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_transformers_bert(tmp_path: Path) -> None:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 60}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**size)).eval()
    example = {"input_ids": torch.randint(0, 60, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    quantized = quantize(model, None, example_kwargs=example)
    quantized.calibrate([example])
    assert quantized.export(tmp_path / "bert.onnx").sqnr_db > 20


@pytest.mark.parametrize("name", ["cnn", "mobilenet", "unet", "lstm", "vit", "decoder"])
def test_a_torch_export_program_is_the_fake_quantized_model(name: str, tmp_path: Path) -> None:
    make, example, _ = MODELS[name]
    quantized, _ = calibrated(make(), example)
    quantized.export(tmp_path / "model.pt2")
    other = example()[:3]
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(other), quantized.model(other))


@pytest.mark.parametrize(
    "name", ["residual", "mobilenet", pytest.param("resnet18", marks=pytest.mark.slow), pytest.param("unet", marks=pytest.mark.slow)]
)
def test_openvino_runs_the_convolutions_in_int8(name: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    make, example, _ = MODELS[name]
    quantized, _ = calibrated(make(), example, {"deployment_settings": {"target_framework": "openvino"}})
    quantized.export(tmp_path / "model.onnx")
    compiled = openvino.Core().compile_model(str(tmp_path / "model.onnx"), "CPU")
    other = example()[:3]
    with torch.no_grad():
        expected = quantized.model(other).numpy()
    got = compiled(other.numpy())[0]
    assert np.square(got - expected).sum() < 0.01 * np.square(expected).sum()
    convolutions = [
        op.get_rt_info()
        for op in compiled.get_runtime_model().get_ordered_ops()
        if "Convolution" in op.get_rt_info()["layerType"].astype(str)
    ]
    assert convolutions
    assert {info["runtimePrecision"].astype(str) for info in convolutions} <= {"u8", "i8"}


def test_the_model_trains_on_after_an_export(tmp_path: Path) -> None:
    quantized, x = calibrated(ResidualCNN(), ResidualCNN.example)
    with torch.no_grad():
        before = quantized.model(x)
    quantized.export(tmp_path / "model.onnx")
    with torch.no_grad():
        assert torch.equal(quantized.model(x), before)
    quantized.model.train()
    quantized.model(x).sum().backward()
