"""An exported file runs in INT8 and gives what the fake-quantized model gives."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
import transformers
from export_models import Decoder, LSTMClassifier, MobileNetV2, ResNet18, UNet, ViT, settled
from lightning_modules import Classifier, batches, make_trainer
from models import GuideCNN, ResidualCNN, TokenModel
from torch import Tensor, nn

from lightning_cco import CCOCallback, CCOError, QuantizedModel, quantize
from lightning_cco.export.fold import batch_norm_after, integer_weight

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


def images(size: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(4, 3, size, size)


def tokens(vocabulary: int, length: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, vocabulary, (4, length))


STAGES = ((1, 16, 1, 1), (6, 24, 2, 2))
MODELS = {
    "cnn": (GuideCNN, GuideCNN.example, 2),
    "residual": (ResidualCNN, ResidualCNN.example, 7),
    "mobilenet": (lambda: MobileNetV2(STAGES, 64, 10), images(32), 11),
    "resnet18": (lambda: ResNet18(8, 10), images(64), 20),
    "unet": (UNet, images(16), 5),
    "lstm": (LSTMClassifier, tokens(30, 7), 0),
    "vit": (lambda: ViT(24, 2, 2, 32, 8, 10), images(32), 1),
    "decoder": (Decoder, tokens(50, 9), 0),
    "tokens": (TokenModel, TokenModel.example, 0),
}


def calibrated(model: nn.Module, example: Callable[[], Tensor], settings: Any = None) -> tuple[QuantizedModel, Tensor]:
    torch.manual_seed(0)
    x = example()
    quantized = quantize(settled(model), settings, (x,))
    quantized.calibrate([(x,), (example(),)])
    return quantized, x


def run(path: Path, *arrays: Tensor) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {entry.name: array.numpy() for entry, array in zip(session.get_inputs(), arrays, strict=True)})[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_file_agrees_with_fake_quantization_at_any_batch_size(name: str, tmp_path: Path) -> None:
    make, example, integer = MODELS[name]
    quantized, x = calibrated(make(), example)
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
    del x


def test_transformers_bert(tmp_path: Path) -> None:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 60}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**size)).eval()
    example = {"input_ids": torch.randint(0, 60, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    quantized = quantize(model, None, example_kwargs=example)
    quantized.calibrate([example])
    assert quantized.export(tmp_path / "bert.onnx").sqnr_db > 20


def test_what_is_in_the_file(tmp_path: Path) -> None:
    quantized, _ = calibrated(GuideCNN(), GuideCNN.example)
    quantized.export(tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["QuantizeLinear"] == 4  # where the plan has them and nowhere else
    types = {entry.name: entry.data_type for entry in model.graph.initializer}
    assert Counter(types.values())[onnx.TensorProto.INT32] == 3  # a bias for each INT8 layer
    shapes = {tuple(entry.dims): entry.data_type for entry in model.graph.initializer}
    assert shapes[8, 4, 3, 3] == onnx.TensorProto.INT8
    assert shapes[10, 16] == onnx.TensorProto.FLOAT  # the tail
    assert {node.name for node in model.graph.node} >= {"input_0_quantize", "relu_quantize", "relu_1_quantize", "relu_2_quantize"}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert "linear_1" in json.loads(metadata["lightning_cco.skipped_layers"])
    assert json.loads(metadata["lightning_cco.recipe"])["global_quantization_settings"]["weights_num_bits"] == 8
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param


@pytest.mark.parametrize("name", ["cnn", "mobilenet", "unet", "lstm", "vit", "decoder"])
def test_a_torch_export_program_is_the_fake_quantized_model(name: str, tmp_path: Path) -> None:
    make, example, _ = MODELS[name]
    quantized, _ = calibrated(make(), example)
    quantized.export(tmp_path / "model.pt2")
    other = example()[:3]
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(other), quantized.model(other))


@pytest.mark.parametrize("name", ["cnn", "residual", "mobilenet", "resnet18"])
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


def test_inputs_and_outputs_keep_their_names(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.boxes, self.scores = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(8, 3)

        def forward(self, image: Tensor, scale: Tensor) -> dict[str, Tensor]:
            h = torch.relu(self.body(image) * scale)
            return {"scores": self.scores(h), "boxes": self.boxes(h)}

    torch.manual_seed(0)
    example = {"image": torch.randn(3, 4), "scale": torch.rand(3, 8)}
    quantized = quantize(Named().eval(), None, example_kwargs=example)
    quantized.calibrate([example])
    assert quantized.export(tmp_path / "model.onnx").sqnr_db > 20
    session = ort.InferenceSession(str(tmp_path / "model.onnx"))
    assert [entry.name for entry in session.get_inputs()] == ["image", "scale"]
    assert [entry.name for entry in session.get_outputs()] == ["scores", "boxes"]


def test_weights_take_a_quarter_of_the_size(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 2))
    quantized, _ = calibrated(model, images(8))
    assert quantized.export(tmp_path / "model.onnx").size_ratio < 0.28


@pytest.mark.parametrize("kind", ["conv", "conv_transpose", "linear"])
def test_folding_a_batch_norm_is_exact(kind: str) -> None:
    layer = {"conv": nn.Conv2d(3, 6, 3, bias=True), "conv_transpose": nn.ConvTranspose2d(3, 6, 3), "linear": nn.Linear(5, 6)}[kind]
    norm = nn.BatchNorm1d(6) if kind == "linear" else nn.BatchNorm2d(6)
    model = nn.Sequential(layer, norm, nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(4, 5) if kind == "linear" else torch.randn(4, 3, 7, 7)
    model(x)
    quantized, _ = calibrated(model, lambda: x)
    norm.weight.data[2] = 0.0
    assert batch_norm_after(quantized, kind) == "batch_norm"
    folded = integer_weight(quantized, kind, layer.weight, layer.bias)
    assert (folded.scale > 0).all()
    shape = [1] * layer.weight.dim()
    shape[folded.axis] = -1
    weight = folded.integers.float() * folded.scale.reshape(shape)
    function = {"conv": F.conv2d, "conv_transpose": F.conv_transpose2d, "linear": F.linear}[kind]
    with torch.no_grad():
        expected = norm(function(x, quantized.weights[kind][0](layer.weight), layer.bias))
        torch.testing.assert_close(function(x, weight, folded.bias), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("settings", "note"), [({"global_quantization_settings": {"weights_num_bits": 4}}, "weights of fewer"),
                                                ({"global_quantization_settings": {"activations_num_bits": 4}}, "activations of fewer"),
                                                ({"deployment_settings": {"target_framework": "tensorrt"}}, "TensorRT")])  # fmt: skip
def test_other_formats_agree_and_are_said(settings: Any, note: str, tmp_path: Path) -> None:
    quantized, _ = calibrated(ResidualCNN(), ResidualCNN.example, settings)
    report = quantized.export(tmp_path / "model.onnx")
    assert report.sqnr_db > 20
    assert any(note in said for said in report.notes)


def test_a_file_that_differs_is_refused_and_names_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, _ = calibrated(ResidualCNN(), ResidualCNN.example)
    monkeypatch.setattr("lightning_cco.export.emit.integer_weight", lambda *a, **k: _doubled(integer_weight(*a, **k), a[1] == "conv_1"))
    with pytest.raises(CCOError, match=r"differs.*'relu_1'"):
        quantized.export(tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def _doubled(weight: Any, wrong: bool) -> Any:
    from dataclasses import replace

    return replace(weight, scale=40 * weight.scale) if wrong else weight


def test_the_model_trains_on_after_an_export(tmp_path: Path) -> None:
    quantized, x = calibrated(ResidualCNN(), ResidualCNN.example)
    with torch.no_grad():
        before = quantized.model(x)
    quantized.export(tmp_path / "model.onnx")
    with torch.no_grad():
        assert torch.equal(quantized.model(x), before)
    quantized.model.train()
    quantized.model(x).sum().backward()


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


QUICK = {"training_settings": {"stats_steps": 2}, "monitoring_settings": {"draw_graph": False}}


def test_the_callback_exports_after_fit(tmp_path: Path) -> None:
    cco, model = CCOCallback(QUICK), Classifier()
    with pytest.raises(CCOError, match=r"trainer\.fit"):
        cco.export(tmp_path / "model.onnx")
    make_trainer(tmp_path, cco).fit(model, batches())
    report = cco.export(tmp_path / "model.onnx")
    assert report.sqnr_db > 20
    assert json.loads((tmp_path / "export_report.json").read_text())["integer_nodes"]["QLinearConv"] == 5
    x = next(iter(batches()))[0]
    model.eval()
    with torch.no_grad():
        np.testing.assert_allclose(run(tmp_path / "model.onnx", x), model(x).numpy(), atol=0.1)


def test_export_dir_hands_over_the_best_checkpoint(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    cco = CCOCallback({**QUICK, "deployment_settings": {"export_dir": str(tmp_path / "int8")}})
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", monitor="val_loss", mode="max")  # the best is then not the last
    model, val = Classifier(), batches(seed=5)
    trainer = make_trainer(tmp_path, cco, checkpoint, max_epochs=3)
    trainer.fit(model, batches(), val)
    after_fit = {name: value.clone() for name, value in model.state_dict().items()}
    written = json.loads((tmp_path / "int8" / "export_report.json").read_text())
    assert written["sqnr_db"] > 20
    x = next(iter(val))[0]
    got = run(tmp_path / "int8" / "Classifier_int8.onnx", x)
    assert all(torch.equal(value, after_fit[name]) for name, value in model.state_dict().items())
    trainer.test(model, val, ckpt_path="best", verbose=False)
    model.eval()
    with torch.no_grad():
        np.testing.assert_allclose(got, model(x).numpy(), atol=0.1)
