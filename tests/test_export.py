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
from lightning_cco.export.engine_patterns import adds_products_exactly

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
    ("name", "target", "layer_type", "integer"),
    [
        ("residual", "openvino", "Convolution", 5),
        ("residual", "ort", "Convolution", 5),
        ("residual", "tensorrt", "Convolution", 5),
        ("decoder", "openvino", "FullyConnected", 8),
        ("vit", "openvino", "FullyConnected", 8),
        pytest.param("mobilenet", "openvino", "Convolution", 9, marks=pytest.mark.slow),
        pytest.param("resnet18", "openvino", "Convolution", 20, marks=pytest.mark.slow),
        pytest.param("unet", "openvino", "Convolution", 5, marks=pytest.mark.slow),
    ],
)
def test_openvino_computes_in_int8_and_agrees(name: str, target: str, layer_type: str, integer: int, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    make, example, _ = MODELS[name]
    settings = {
        "global_quantization_settings": {"weights_num_bits": 8 if adds_products_exactly() else 7},
        "deployment_settings": {"target_framework": target, "vnni": True},
    }
    quantized, _ = calibrated(make(), example, settings)
    other = example()[:3]
    quantized.export(tmp_path / "model.onnx")
    model = openvino.Core().read_model(str(tmp_path / "model.onnx"))
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.no_grad():
        expected = quantized.model(other).numpy()
    got = compiled(other.numpy())[0]
    assert np.square(got - expected).sum() < 0.001 * np.square(expected).sum()
    information = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
    precisions = [info["runtimePrecision"].astype(str) for info in information if info["layerType"].astype(str) == layer_type]
    assert sum(precision in ("u8", "i8") for precision in precisions) >= integer


def test_the_model_trains_on_after_an_export(tmp_path: Path) -> None:
    quantized, x = calibrated(ResidualCNN(), ResidualCNN.example)
    with torch.no_grad():
        before = quantized.model(x)
    quantized.export(tmp_path / "model.onnx")
    with torch.no_grad():
        assert torch.equal(quantized.model(x), before)
    quantized.model.train()
    quantized.model(x).sum().backward()
