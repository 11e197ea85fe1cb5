"""Each feature that an engine requires of its files is still needed: a test that fails here says that its range of versions has ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from engine_files import File, agrees, optimized, reference
from export_models import UNet, settled
from torch import Tensor

from lightning_cco import QuantizedModel, quantize
from lightning_cco.export.engine_patterns import adds_products_exactly
from lightning_cco.export.engines import ENGINES, FileFeature

ROOT = Path(__file__).resolve().parents[2]
X = np.random.default_rng(1).standard_normal((2, 3, 16, 16)).astype(np.float32)


@pytest.mark.parametrize("name", ENGINES)
def test_each_want_has_a_range_of_versions_and_a_canary(name: str) -> None:
    wants = ENGINES[name].requirements
    assert len({entry.feature for entry in wants}) == len(wants)
    for entry in wants:
        assert entry.versions
        assert entry.seen
        path, _, test = entry.canary.partition("::")
        if not path:
            assert ENGINES[name].not_run
            continue
        assert f"def {test or entry.feature.name.lower()}(" in (ROOT / path).read_text(encoding="utf-8"), entry.feature


def convolution(file: File, x: str, channels: int = 3, bias: bool = True) -> str:
    weight = file.weight(8, channels, 3, 3)
    addend = [file.constant(np.linspace(-1, 1, 8, dtype=np.float32))] if bias else []
    return file.node("Conv", x, weight, *addend, pads=[1, 1, 1, 1])


@pytest.mark.parametrize("integers", [True, False])
def test_ort_integer_bias(integers: bool, tmp_path: Path) -> None:
    """From 1.32 on, at the latest, a bias in float is made integers; the oldest version that is supported is 1.20."""
    file = File()
    weight, x = file.weight(8, 3, 3, 3), file.rounded("x")
    bias = file.constant(np.arange(8, dtype=np.int32 if integers else np.float32))
    if integers:
        bias = file.node("DequantizeLinear", bias, file.constant(np.full(8, 0.02 * 0.01, np.float32)), axis=0)
    output = file.rounded(file.node("Conv", x, weight, bias, pads=[1, 1, 1, 1]), 0.05)
    assert optimized(file.save(tmp_path / "a.onnx", X.shape, output))["QLinearConv"]


@pytest.mark.parametrize("integers", [True, False])
def test_ort_integer_indexing(integers: bool, tmp_path: Path) -> None:
    file = File()
    step, zero = file.constant(np.float32(0.02)), file.constant(np.uint8(128))
    index = file.constant(np.array([0, 2, 1], np.int64))
    levels = file.node("QuantizeLinear", "x", step, zero)
    if integers:
        x = file.node("DequantizeLinear", file.node("Gather", levels, index, axis=1), step, zero)
    else:
        x = file.node("Gather", file.node("DequantizeLinear", levels, step, zero), index, axis=1)
    output = file.rounded(convolution(file, x, bias=False), 0.05)
    assert bool(optimized(file.save(tmp_path / "a.onnx", X.shape, output))["QLinearConv"]) is integers


@pytest.mark.parametrize("integers", [True, False])
def test_ort_integer_clips(integers: bool, tmp_path: Path) -> None:
    file = File()
    x = convolution(file, file.rounded("x"), bias=False)
    if integers:
        output = file.rounded(x, 0.1, 7, clip=(0, 15))
    else:
        output = file.rounded(file.node("Clip", x, file.constant(np.float32(-0.7)), file.constant(np.float32(0.8))), 0.1, 7)
    assert bool(optimized(file.save(tmp_path / "a.onnx", X.shape, output))["QLinearConv"]) is integers


def exported(model: torch.nn.Module, x: Tensor, target: str, bits: int, path: Path) -> QuantizedModel:
    settings = {
        "global_quantization_settings": {"weights_num_bits": bits, "activations_num_bits": bits, "skip_tail_quantization": False},
        "deployment_settings": {"target_framework": target, "vnni": True},
    }
    quantized = quantize(model.eval(), settings, (x,))
    quantized.calibrate([x])
    quantized.export(path, check=False)
    return quantized


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, FileFeature], None]:
    """Files are written for an engine that does not require a feature."""

    def write(name: str, feature: FileFeature) -> None:
        engine = replace(ENGINES[name], requirements=tuple(entry for entry in ENGINES[name].requirements if entry.feature is not feature))
        monkeypatch.setattr("lightning_cco.export.stored_tensors.ENGINES", {**ENGINES, name: engine})

    return write


class Pooled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(torch.relu(self.conv(x)).mean((2, 3)))))


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.skipif(adds_products_exactly(), reason="a processor with VNNI asks for no exact products")
@pytest.mark.parametrize("own", [True, False])
def test_ort_own_zero_points(own: bool, tmp_path: Path, without: Callable[[str, FileFeature], None]) -> None:
    if not own:
        without("ort", FileFeature.OWN_ZERO_POINTS)
    exported(Pooled(), torch.from_numpy(X), "ort", 8, tmp_path / "a.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        ort.InferenceSession(str(tmp_path / "a.onnx"), options, providers=["CPUExecutionProvider"])
        loaded = True
    except Exception:  # of a type that it does not export
        loaded = False
    assert loaded is own


@pytest.mark.parametrize("shared", [True, False])
def test_ort_block_operators(shared: bool, tmp_path: Path) -> None:
    file = File(21)
    integers = [file.random.integers(-7, 8, (64, 96)).astype(np.int8)] * 2
    scales = np.full((2, 96), 0.01, np.float32)
    first = file.constant(integers[0])
    blocks = [(name, file.constant(scales)) for name in (first, first if shared else file.constant(integers[1]))]
    weights = [file.node("DequantizeLinear", *block, axis=0, block_size=32) for block in blocks]
    products = [file.node("MatMul", x, weight) for x, weight in zip(("x", file.node("Tanh", "x")), weights, strict=True)]
    found = optimized(file.save(tmp_path / "a.onnx", (2, 5, 64), file.node("Add", *products)))
    assert found["MatMulNBits"] == (0 if shared else 2)


@pytest.mark.skipif(ort.__version__.startswith("1.20."), reason="this version leaves float weights alone")
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose", "Gemm"])
def test_ort_float_weights(operator: str, same: bool, tmp_path: Path) -> None:
    file = File()
    shape = (2, 16) if operator == "Gemm" else (2, 8, 6, 6)
    weight = file.constant(file.random.standard_normal((16, 8) if operator == "Gemm" else (8, 8, 3, 3)).astype(np.float32))
    result = file.node(operator, file.rounded("x"), weight)
    result = file.node("LeakyRelu", result, alpha=1.0) if same else result
    path = file.save(tmp_path / "a.onnx", shape, file.rounded(result, 0.05))
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    step = np.abs(session.run(None, {"x": x})[0] - reference(path, x)).max() / 0.05
    found = optimized(path)
    assert (not found["QLinearConv"] + found["QGemm"]) is same or operator == "ConvTranspose"
    assert bool(step < 1e-3) is same


@pytest.mark.parametrize("separate", [True, False])
def test_ort_separate_roundings(separate: bool, tmp_path: Path) -> None:
    file = File()
    product = file.node("Gemm", file.rounded("x"), file.weight(16, 8), transB=1)
    rounded = file.rounded(file.node("LeakyRelu", product, alpha=1.0) if separate else product, 0.05)
    path = file.save(tmp_path / "a.onnx", (4, 8), file.node("Sub", file.node("Round", product), rounded))
    assert bool(optimized(path)["QGemm"] + optimized(path)["MatMulIntegerToFloat"]) is separate


@pytest.mark.parametrize("full", [True, False])
def test_ort_full_biases(full: bool, tmp_path: Path) -> None:
    file = File()
    product = file.node("MatMul", file.rounded("x"), file.weight(16, 8, axis=1))
    bias = np.linspace(-1, 1, 8, dtype=np.float32)
    output = file.node("Add", product, file.constant(bias[None, None] if full else bias))
    found = optimized(file.save(tmp_path / "a.onnx", (2, 5, 16), output))
    assert bool(found["MatMulIntegerToFloat"] + found["DynamicQuantizeMatMul"]) is full


class Text(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True)
        self.table, self.layers = torch.nn.Embedding(50, 32), torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.table(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stored", [True, False])
def test_ort_stored_transposed(stored: bool, tmp_path: Path, without: Callable[[str, FileFeature], None]) -> None:
    if not stored:
        without("ort", FileFeature.STORED_TRANSPOSED)
    exported(Text(), torch.randint(0, 50, (2, 9)), "ort", 8, tmp_path / "a.onnx")
    assert (optimized(tmp_path / "a.onnx")["MatMulIntegerToFloat"] == 12) is stored


@pytest.mark.skipif(adds_products_exactly(), reason="a processor with VNNI adds exactly")
@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_ort_unsigned_without_vnni(kind: Any, tmp_path: Path) -> None:
    file = File()
    x = file.rounded("x", 0.005, 0)
    weight = file.weight(8, 3, 3, 3, kind=kind, most=127)
    output = file.rounded(file.node("Conv", x, weight, pads=[1, 1, 1, 1]), 0.2)
    path = file.save(tmp_path / "a.onnx", X.shape, output)
    x_large = np.full_like(X, 1.2)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert agrees(session.run(None, {"x": x_large})[0], reference(path, x_large)) is (kind is np.uint8)


@pytest.mark.parametrize("opset", [20, 21])
def test_ort_opset(opset: int, tmp_path: Path) -> None:
    file = File(opset)
    x = file.rounded("x", 0.02, 0, np.int8)
    y = file.node("Reshape", x, file.constant(np.array([-1, 768], np.int64)))
    output = file.rounded(file.node("Gemm", y, file.weight(8, 768), transB=1), 0.05, 0, np.int8)
    file.save(tmp_path / "a.onnx", X.shape, output)
    try:
        optimized(tmp_path / "a.onnx")
        loaded = True
    except Exception:  # of a type that it does not export
        loaded = False
    assert loaded is (opset <= ENGINES["ort"].amount(FileFeature.OPSET, 0))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("integers", [True, False])
def test_openvino_integer_clips(integers: bool, tmp_path: Path, without: Callable[[str, FileFeature], None]) -> None:
    pytest.importorskip("openvino")
    if not integers:
        without("openvino", FileFeature.INTEGER_CLIPS)
    x = torch.randn(4, 3, 16, 16)
    quantized = exported(settled(UNet()), x, "openvino", 4, tmp_path / "a.onnx")
    load = ENGINES["openvino"].load
    assert load is not None
    with torch.no_grad():
        expected = quantized.model(x).numpy()
    got = load(tmp_path / "a.onnx").run({"x": x.numpy()})[0]
    assert (np.square(got - expected).sum() < 0.003 * np.square(expected).sum()) is np.bool_(integers)


class Largest(torch.nn.Module):
    """The largest value of each channel, rounded for a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(self.conv(x).amax((2, 3)))))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("by_sorting", [True, False])
def test_openvino_sorted_maxima(by_sorting: bool, tmp_path: Path, without: Callable[[str, FileFeature], None]) -> None:
    pytest.importorskip("openvino")
    if not by_sorting:
        without("openvino", FileFeature.SORTED_MAXIMA)
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    quantized = exported(Largest(), x, "openvino", 7, tmp_path / "a.onnx")
    load = ENGINES["openvino"].load
    assert load is not None
    with torch.no_grad():
        expected = quantized.model(x).numpy()
    got = load(tmp_path / "a.onnx").run({"x": x.numpy()})[0]
    assert (np.square(got - expected).sum() < 0.003 * np.square(expected).sum()) is np.bool_(by_sorting)


class WithToken(torch.nn.Module):
    """A convolution and a token that is expanded to the size of the batch, as in vision transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token, self.head = torch.nn.Conv2d(3, 8, 4, 4), torch.nn.Parameter(torch.randn(1, 1, 8)), torch.nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(torch.cat([self.token.expand(x.shape[0], -1, -1), patches], 1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("counted", [True, False])
def test_openvino_counted_sizes(counted: bool, tmp_path: Path, without: Callable[[str, FileFeature], None]) -> None:
    pytest.importorskip("openvino")
    if not counted:
        without("openvino", FileFeature.COUNTED_SIZES)
    torch.manual_seed(0)
    model, x = WithToken(), torch.randn(4, 3, 16, 16)
    torch.nn.init.normal_(model.patches.bias)
    quantized = exported(model, x, "openvino", 7, tmp_path / "a.onnx")
    load = ENGINES["openvino"].load
    assert load is not None
    with torch.no_grad():
        expected = quantized.model(x[:3]).numpy()
    got = load(tmp_path / "a.onnx").run({"x": x[:3].numpy()})[0]
    assert (np.square(got - expected).sum() < 0.003 * np.square(expected).sum()) is np.bool_(counted)
