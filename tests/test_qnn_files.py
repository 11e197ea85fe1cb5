"""Files for QNN: each operator between its own pairs, checked in the engine with a stand-in for it, refused by name."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from export_case import calibrated, run
from export_models import LSTMClassifier, MobileNetV2, TransformerBlock, UNet, ViT, settled
from lightning_modules import Classifier, batches, make_trainer, quick
from onnx import numpy_helper
from torch import Tensor, nn, randint, randn

from lightning_cco import CCOError, CCOWarning, capture_graph, plan_quantization, quantize
from lightning_cco.export.engines import ENGINES, Computed, qnn_process
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.settings import load_settings

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own
WHOLE = {"global_quantization_settings": {"skip_tail_quantization": False}, "deployment_settings": {"target_framework": "qnn"}}
FEW = {**WHOLE, "global_quantization_settings": {"skip_tail_quantization": False, "weights_num_bits": 4, "activations_num_bits": 4}}
MOVES = ("Reshape", "Transpose", "Split", "Gather", "Slice", "MaxPool", "Resize", "Pad", "Squeeze", "Unsqueeze", "Flatten", "DepthToSpace")
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class InOrt:
    """QNN's place: the file, operator by operator, in ONNX Runtime."""

    floats: tuple[str, ...] = ()
    off = 0.0
    refuses = ""

    def __init__(self, path: Path) -> None:
        import onnxruntime as ort

        if self.refuses:
            raise RuntimeError(f"This session contains graph nodes that are assigned to the default CPU EP: '{self.refuses}'")
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.model = onnx.load(path)
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(self, feeds: Any) -> list[np.ndarray]:
        names = [entry.name for entry in self.session.get_outputs()]
        found = self.session.run(None, feeds)
        return [
            (value + self.off).astype(value.dtype) if name == "relu_quantized" else value for name, value in zip(names, found, strict=True)
        ]

    def computed(self) -> list[Computed]:
        nodes = [node for node in self.model.graph.node if node.op_type in (*PRODUCTS, "Relu", "Softmax")]
        return [
            Computed(
                node.op_type,
                "f32" if node.op_type == "Softmax" or node.name in self.floats else "u8",
                node.op_type in PRODUCTS,
                (node.name,),
                True,
            )
            for node in nodes
        ]


def in_ort(monkeypatch: pytest.MonkeyPatch, **attributes: Any) -> None:
    made = type("InOrt", (InOrt,), attributes)
    engine = dataclasses.replace(ENGINES["qnn"], load=made, package="onnx")
    monkeypatch.setattr("lightning_cco.export.stored_tensors.ENGINES", {"qnn": engine})
    monkeypatch.setattr("lightning_cco.export.onnx_file.ENGINES", {"qnn": engine})


def planned(model: nn.Module, example: Tensor, **overall: Any) -> QuantizationPlan:
    settings = {**WHOLE, "global_quantization_settings": {"skip_tail_quantization": False, **overall}}
    return plan_quantization(capture_graph(model.eval(), example), load_settings(settings))


def kinds(plan: QuantizationPlan, *names: str) -> set[bool]:
    return {layer.name in plan.quantized for layer in plan.graph if layer.kind in names}


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 8, 2, 2, groups=2)
        self.pool, self.head = nn.AdaptiveAvgPool2d(2), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.up(torch.relu(self.stem(x)))).flatten(1))


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.table(tokens))))


def test_every_product_is_rounded_the_tail_too() -> None:
    plan = planned(MobileNetV2(((1, 8, 1, 1), (2, 8, 2, 2)), 8, 4), randn(1, 3, 16, 16))
    assert kinds(plan, "conv", "linear", "add") == {True}
    plan = planned(TransformerBlock(8, 2, causal=False), randn(2, 5, 8))
    assert (kinds(plan, "linear"), kinds(plan, "add", "scaled_dot_product_attention")) == ({True}, {False})
    plan = planned(UNet(), randn(1, 3, 16, 16))
    assert kinds(plan, "concat", "conv_transpose", "interpolate") == {True}
    plan = planned(Pooled(), randn(1, 3, 16, 16))
    assert kinds(plan, "conv_transpose", "adaptive_avg_pool") == {False}
    plan = planned(LSTMClassifier(), randint(0, 30, (2, 5)))
    assert (kinds(plan, "lstm", "embedding"), list(plan.weight_only)) == ({False}, [])
    with pytest.warns(CCOWarning, match=r"weight_only: true with target_framework: qnn, .* 'linear', 'linear_1' stay in float"):
        plan = planned(Lookup(), randint(0, 20, (2, 5)), weight_only=True)
    assert plan.skipped["linear"].endswith("weight_only: true for all layers, and qnn multiplies no floats with integer weights")


@pytest.mark.parametrize(
    ("make", "example", "settings"),
    [
        pytest.param(lambda: settled(UNet(4)), lambda: randn(2, 3, 16, 16), WHOLE, marks=pytest.mark.slow),
        pytest.param(lambda: settled(ViT(16, 1, 2, 16, 8, 4)), lambda: randn(2, 3, 16, 16), WHOLE, marks=pytest.mark.slow),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 4, 1)), lambda: randn(2, 3, 8, 8), FEW),
        (Pooled, lambda: randn(2, 3, 16, 16), WHOLE),
        (Lookup, lambda: randint(0, 20, (2, 5)), WHOLE),
    ],
    ids=["u-net", "vit", "few bits", "stem", "table"],
)
def test_each_operator_stands_between_its_own_pairs(make: Any, example: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    quantized, x = calibrated(make(), example, settings)
    quantized.export(tmp_path / "model.onnx", dynamic_batch=False, check=False)
    graph = onnx.load(tmp_path / "model.onnx").graph
    made = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    constants = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    outputs = {entry.name for entry in graph.output}
    integers = {name for name, node in made.items() if node.op_type == "QuantizeLinear"} | {
        name for name, array in constants.items() if array.dtype in (np.uint8, np.int8)
    }
    assert "SpaceToDepth" not in {node.op_type for node in graph.node}
    for node in graph.node:
        reads = made.get(node.input[0])
        if node.op_type in MOVES and reads is not None and reads.op_type == "DequantizeLinear" and reads.input[0] not in constants:
            for name in {*node.output} - outputs:
                assert set(readers.get(name, ["QuantizeLinear"])) == {"QuantizeLinear"}, node.name
        if node.op_type not in ("DequantizeLinear", "QuantizeLinear"):
            assert not integers & set(node.input), f"{node.name} computes on integers alone"
        if node.op_type in ("Conv", "Gemm"):
            assert {made[name].op_type for name in node.input} == {"DequantizeLinear"}
            assert set(readers[node.output[0]]) == {"QuantizeLinear"}
    with torch.no_grad():
        expected = quantized.model(x).numpy()
    got = run(tmp_path / "model.onnx", x, optimize=False)
    assert 10 * np.log10(np.square(expected).sum() / max(np.square(expected - got).sum(), 1e-12)) > 20


def test_it_is_run_in_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_ort(monkeypatch)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Softmax(1))
    quantized, _ = calibrated(model, lambda: randn(2, 3, 8, 8), WHOLE)
    report: Any = quantized.export(tmp_path / "model.onnx", dynamic_batch=False)
    assert report.target.startswith("QNN ")
    assert report.target_nodes == {"Conv": 2}
    assert report.target_floats == {"Softmax": 1}
    assert report.target_largest_steps <= 1
    assert "in float: 1 Softmax" in str(report)
    assert any("with the CPU left out" in note for note in report.notes)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"floats": ("node_conv2d_1",)}, r"QNN \S+ computes in float what is planned in INT8: 'conv_1' \(Conv\), 1 in all\. No file"),
        (
            {"off": 2.0},
            r"in QNN \S+, the target, the file differs .*'relu' is \S+ steps off on average \(expected at most 0\.4.*first layer that differs",
        ),
        ({"refuses": "node_conv2d"}, r"QNN \S+, the target, can't run the file at layer 'conv' \(module '0'\): .*default CPU EP"),
    ],
    ids=["float", "wrong", "refused"],
)
def test_what_is_wrong_is_refused_by_name(attributes: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_ort(monkeypatch, **attributes)
    torch.manual_seed(0)
    quantized, _ = calibrated(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), lambda: randn(2, 3, 8, 8), WHOLE)
    with pytest.raises(CCOError, match=message):
        quantized.export(tmp_path / "model.onnx", dynamic_batch=False)
    assert not list(tmp_path.iterdir())


class Reads(nn.Module):
    """Takes any number of samples, or three alone."""

    def __init__(self, three: bool) -> None:
        super().__init__()
        self.linear, self.out, self._three = nn.Linear(6, 8), nn.Linear(8, 3), three

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.out(torch.relu(self.linear(x)) * mask.reshape(3 if self._three else -1, 1))


@pytest.mark.parametrize(
    ("three", "asked", "samples", "said"),
    [
        (False, {}, 1, "the file takes one sample at once: HTP compiles a graph for sizes that are known"),
        (False, {"dynamic_batch": False}, 3, ""),
        (True, {}, 3, "the file takes 3 samples at once, not 1: the model does not take fewer"),
    ],
    ids=["one", "as the example", "no fewer"],
)
def test_its_files_have_a_fixed_number_of_samples(
    three: bool, asked: dict[str, Any], samples: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_ort(monkeypatch)
    torch.manual_seed(0)
    x, mask = torch.randn(3, 6), torch.ones(3)
    quantized = quantize(Reads(three).eval(), WHOLE, (x, mask))
    quantized.calibrate([(x, mask)])
    report: Any = quantized.export(tmp_path / "model.onnx", batches=[(x, mask), (2 * x, mask)], **asked)
    assert report.inputs == {"x": [samples, 6], "mask": [samples]}
    assert report.batches == 6 // samples
    assert any(said in note for note in report.notes)
    feeds = {"x": x[:samples].numpy(), "mask": mask[:samples].numpy()}
    with torch.no_grad():
        expected = quantized.model(x, mask)[:samples]
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # its int8 weights overflow in products without VNNI
    [got] = ort.InferenceSession(tmp_path / "model.onnx", options).run(None, feeds)
    torch.testing.assert_close(torch.from_numpy(got), expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("asked", [{"dynamic_batch": True}, {"dynamic_sizes": True}, {"dynamic_shapes": {"x": {0: "batch"}}}])
def test_axes_that_vary_are_refused_before_anything_is_written(asked: dict[str, Any], tmp_path: Path) -> None:
    quantized, _ = calibrated(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), lambda: randn(2, 3, 8, 8), WHOLE)
    with pytest.raises(CCOError, match=rf"{next(iter(asked))}=.* with target_framework: qnn: HTP compiles .* Leave it out"):
        quantized.export(tmp_path / "model.onnx", check=False, **asked)


def test_a_missing_engine_is_said_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "onnxruntime_qnn" else object())
    quantized, _ = calibrated(Lookup(), lambda: randint(0, 20, (2, 5)), WHOLE)
    with pytest.raises(
        CCOError, match=r"onnxruntime_qnn, in which files for QNN are checked, is not installed\. Write: pip install 'lightning-cco\[qnn\]'"
    ):
        quantized.export(tmp_path / "model.onnx")
    trainer = make_trainer(tmp_path, quick(deployment_settings={"target_framework": "htp", "export_dir": str(tmp_path / "out")}))
    with pytest.raises(CCOError, match=r"after the training there could be no export: onnxruntime_qnn"):
        trainer.fit(Classifier(), batches())
    assert trainer.global_step == 0


def test_what_it_executes_is_read_from_its_own_graph(tmp_path: Path) -> None:
    tensors = {
        "relu_quantized": {"data_type": 0x0408},
        "x": {"data_type": 0x0232},
        "softmax": {"data_type": 0x0232},
        "moved": {"data_type": 0x0408},
    }
    nodes = {
        "node_conv2d_token_1": {"type": "Conv2d", "output_names": ["relu_quantized"]},
        "node_softmax": {"type": "Softmax", "output_names": ["softmax"]},
        "Transpose_2": {"type": "Transpose", "output_names": ["moved"]},
    }
    (tmp_path / "a.json").write_text(json.dumps({"graph": {"nodes": nodes, "tensors": tensors}}))
    (tmp_path / "a_tensor_log.json").write_text(json.dumps({"graph_name": "a", "initializers": []}))
    assert qnn_process._executed(tmp_path) == [
        ("Conv2d", "u8", True, ("node_conv2d_token_1", "relu_quantized")),
        ("Softmax", "f32", True, ("node_softmax", "softmax")),
        ("Transpose", "u8", False, ("Transpose_2", "moved")),
    ]


LOG = """2026-01-01 [V:onnxruntime:, qnn_execution_provider.cc:1713 LogNodeSupport] Validation PASSED for 1 nodes in OrtNodeUnit (Relu) :
\tOperator type: Relu Node name: node_relu Node index: 9

2026-01-01 [V:onnxruntime:, qnn_execution_provider.cc:1713 LogNodeSupport] Validation FAILED for 1 nodes in OrtNodeUnit (Mod) :
\tOperator type: Mod Node name: node_fmod Node index: 10
\tREASON : QNN Mod Op only support fmod == 0 for now.

"""


def test_nodes_that_it_has_no_form_for_are_named_once_with_its_reason() -> None:
    """ONNX Runtime's log has them at its lowest level alone, for each of its passes."""
    assert qnn_process._refused(LOG + LOG) == "Mod 'node_fmod' (QNN Mod Op only support fmod == 0 for now.)"
    assert qnn_process._refused(LOG.replace("FAILED", "PASSED")) == ""


def test_what_fails_is_read_from_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        os.write(2, b"why")
        raise RuntimeError

    assert qnn_process._printed(fails) == "why"
    os.write(2, b"later")
    assert capfd.readouterr().err == "later"
