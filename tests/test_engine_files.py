"""Files of engines that read programs: checked in the engine, refused by name, and what is missing said before the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_case import calibrated
from lightning_modules import Classifier, batches, make_trainer, quick
from models import GuideCNN, ResidualCNN
from program_engine import in_torch
from torch import nn

from lightning_cco import CCOError, QuantizedModel
from lightning_cco.export.engines.worker import Worker
from lightning_cco.export.report import ExportReport

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.export's own
PROGRAM = {"deployment_settings": {"target_framework": "executorch"}}


@pytest.fixture(scope="module")
def cnn() -> QuantizedModel:
    return calibrated(GuideCNN(), GuideCNN.example, PROGRAM)[0]


def test_the_file_is_run_in_its_engine_sample_by_sample(cnn: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = in_torch(monkeypatch)
    report = cnn.export(tmp_path / "model.pte", batches=[(torch.randn(5, 1, 8, 8),), (torch.randn(1, 1, 7, 7),)])
    assert isinstance(report, ExportReport)
    assert (report.inputs, report.batches, report.variations) == ({"x": [1, 1, 8, 8]}, 5, 1)
    assert report.integer_nodes == {"aten::conv2d": 2, "aten::linear": 2}
    assert report.sqnr_db > 60
    assert report.largest_steps <= 1
    assert report.target.startswith("ExecuTorch ")
    assert [entry.layer for entry in report.layers] == ["input_0", "relu", "relu_1", "relu_2"]
    assert any("other sizes than the file takes" in note for note in report.notes)
    assert "between samples" not in str(report)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pte"]
    assert engine.started == 1


@pytest.mark.parametrize(
    "put",
    [
        lambda model, x: (model, torch.from_numpy(x[:, 0].numpy()[:, None])),  # NumPy gives a new axis a stride of 0
        lambda model, x: (model, x.as_strided(x.shape, (64, 1, 8, 1))),  # channels_last, of one channel
        lambda model, x: (model, x[:1].expand(4, -1, -1, -1)),
        lambda model, x: (model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)),
    ],
    ids=["new axis", "one channel last", "expanded", "channels last"],
)
def test_layouts_in_memory_are_no_part_of_the_file(put: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ExecuTorch takes strides for a part of a tensor's type, and converts none of 0."""
    in_torch(monkeypatch)
    model, x = put(GuideCNN(), torch.randn(4, 1, 8, 8))
    weights = [tensor.stride() for tensor in model.parameters()]
    quantized, _ = calibrated(model, lambda: x, PROGRAM)
    report = quantized.export(tmp_path / "model.pte")
    assert isinstance(report, ExportReport)
    assert report.sqnr_db > 60
    program = torch.export.load(tmp_path / "model.pte")
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    assert [value.stride() for value in values] == [torch.empty(value.shape).stride() for value in values]
    assert [tensor.stride() for tensor in model.parameters()] == weights


@pytest.mark.parametrize(
    ("attributes", "options", "message"),
    [
        ({"factor": (1, 1.3)}, {}, r"differs from the fake-quantized model: 'relu' is .* the first layer that differs is 'relu'"),
        ({"floats": ("conv_1", "linear_1")}, {}, r"computes in float what is planned in INT8: 'conv_1' \(aten::conv2d\), 1 in all"),
        ({"crashes": "start"}, {}, r"ExecuTorch can't be loaded: .*no such symbol.*pip install 'lightning-cco\[executorch\]'"),
        ({"crashes": "convert"}, {}, r"ExecuTorch \S+ can't convert the model: .*aten::erf.*No file was written"),
        ({"crashes": "run"}, {}, r"can't run the file: .*status -11.*No file was written"),
        ({}, {"opset_version": 20}, r"a \.pte file takes the options batches, batch_size.*got \['opset_version'\]"),
        ({}, {"batch_size": 0}, r"batch_size: expected a number of samples of at least 1, got 0"),
    ],
    ids=["wrong layer", "float layer", "start", "convert", "run", "option", "batch size"],
)
def test_it_is_refused_by_name(
    attributes: dict[str, Any], options: dict[str, Any], message: str, cnn: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_torch(monkeypatch, **attributes)
    with pytest.raises(CCOError, match=message):
        cnn.export(tmp_path / "model.pte", **options)
    assert not list(tmp_path.iterdir())


def test_the_layer_of_an_operator_that_can_not_be_converted_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As LiteRT, Core ML and ExecuTorch name operators."""
    quantized, _ = calibrated(nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveMaxPool2d(2)), lambda: torch.randn(1, 3, 4, 4), PROGRAM)
    for said in (
        "RuntimeError: Lowering not found: aten.adaptive_max_pool2d.default",
        "NotImplementedError: Unsupported fx node pool, kind adaptive_max_pool2d.default",
        "Missing out variants: {'aten::adaptive_max_pool2d'}",
    ):
        in_torch(monkeypatch, crashes="convert", said=said)
        with pytest.raises(CCOError, match=r"ExecuTorch \S+ can't convert the model at 'adaptive_max_pool': ") as caught:
            quantized.export(tmp_path / "model.pte")
        assert said in str(caught.value)


def test_what_multiplies_no_weights_is_refused_by_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, _ = calibrated(ResidualCNN(), ResidualCNN.example, PROGRAM)
    assert "add" in quantized.plan.quantized
    in_torch(monkeypatch, floats=("add",))
    with pytest.raises(CCOError, match=r"computes in float what is planned in INT8: 'add' \(aten::add\), 1 in all"):
        quantized.export(tmp_path / "model.pte")


def test_unchecked_it_is_written_all_the_same(cnn: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_torch(monkeypatch, floats=("conv_1",), crashes="run")
    report = cnn.export(tmp_path / "model.pte", check=False, batch_size=2)
    assert isinstance(report, ExportReport)
    assert report.inputs == {"x": [2, 1, 8, 8]}
    assert [island.layers for island in report.float_islands if island.unplanned] == [("conv_1",)]


def test_layers_that_the_engine_rounds_by_itself_are_named(cnn: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LiteRT's converter computes transposed convolutions between roundings in INT8, which the plan has in float."""
    in_torch(monkeypatch)
    [tail] = [name for name in cnn.plan.skipped if cnn.graph[name].kind == "linear"]
    said = cnn.export(tmp_path / "model.pte", check=False)
    assert any(note.startswith("the engine computes in INT8") and f"'{tail}'" in note for note in said.notes)
    in_torch(monkeypatch, floats=(tail,))
    assert not any(note.startswith("the engine computes") for note in cnn.export(tmp_path / "model.pte", check=False).notes)


def test_more_samples_than_the_example_has_are_said(cnn: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_torch(monkeypatch)
    report = cnn.export(tmp_path / "model.pte", check=False, batch_size=9)
    assert isinstance(report, ExportReport)
    assert "the file takes 2 samples at once, not 9: the example has fewer" in report.notes


@pytest.mark.slow
def test_lite_rt_has_a_limit_of_its_own_and_takes_what_executorch_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_torch(monkeypatch, ".tflite", factor=(1, 1.002))
    in_torch(monkeypatch, ".pte", factor=(1, 1.002))
    quantized, _ = calibrated(GuideCNN(), GuideCNN.example, {"deployment_settings": {"target_framework": "tflite"}})
    report = quantized.export(tmp_path / "model.tflite")
    assert isinstance(report, ExportReport)
    assert 0.1 < max(entry.mean_steps for entry in report.layers) < 0.25
    with pytest.raises(CCOError, match=r"'relu' is \S+ steps off on average \(expected at most 0\.1, max_mean_steps"):
        quantized.export(tmp_path / "model.pte")
    assert quantized.export(tmp_path / "model.pte", max_mean_steps=0.3)


def test_a_plan_for_another_engine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_torch(monkeypatch)
    quantized, _ = calibrated(ResidualCNN(), ResidualCNN.example)
    with pytest.raises(CCOError, match=r"planned for target_framework: ort, .*Write deployment_settings: \{target_framework: executorch\}"):
        quantized.export(tmp_path / "model.pte")


def test_a_missing_engine_is_said_before_the_training(cnn: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "executorch" else object())
    with pytest.raises(
        CCOError, match=r"executorch, which writes and runs \.pte files, is not installed\. Write: pip install 'lightning-cco\[exec"
    ):
        cnn.export(tmp_path / "model.pte")
    trainer = make_trainer(tmp_path, quick(deployment_settings={"target_framework": "executorch", "export_dir": str(tmp_path / "out")}))
    with pytest.raises(CCOError, match=r"export_dir is set, but after the training there could be no export: executorch"):
        trainer.fit(Classifier(), batches())
    assert trainer.global_step == 0
    assert not (tmp_path / "out").exists()


def test_a_training_ends_with_the_file_of_its_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_torch(monkeypatch)
    monkeypatch.setattr("lightning_cco.export_dir.need_engine", lambda engine: None)
    cco = quick(deployment_settings={"target_framework": "executorch", "export_dir": str(tmp_path / "out")})
    make_trainer(tmp_path, cco).fit(Classifier(), batches(), batches(seed=5))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Classifier_int8.pte", "Classifier_int8.pte.export_report.json"]
    report = json.loads((tmp_path / "out" / "Classifier_int8.pte.export_report.json").read_text())
    assert report["batches"] > 1
    assert report["target"].startswith("ExecuTorch")


SCRIPT = """
import pickle, sys
def answer(result, error=""):
    pickle.dump((result, error), sys.stdout.buffer); sys.stdout.flush()
answer(None)
while True:
    asked = pickle.load(sys.stdin.buffer)
    if asked == "crash":
        print("something else", file=sys.stderr)
        print("[engine.cpp:12] no such kernel", file=sys.stderr, flush=True)
        sys.exit(3)
    answer(asked * 2, "ValueError: odd" if asked % 2 else "")
"""


def test_a_process_that_ends_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    script = tmp_path / "engine.py"
    script.write_text(SCRIPT)
    worker = Worker(str(script))
    assert worker.ask(4) == 8
    with pytest.raises(RuntimeError, match=r"^ValueError: odd$"):
        worker.ask(3)
    with pytest.raises(RuntimeError, match=r"its process has ended with status 3: \[engine\.cpp:12\] no such kernel"):
        worker.ask("crash")
    with pytest.raises(RuntimeError, match="has ended with status 3"):
        worker.ask(4)
