"""What a user sees is there: tables, files, TensorBoard's pages, and nothing that ends a training."""

from __future__ import annotations

import inspect
import io
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import lightning.pytorch.loggers
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning_modules import Classifier, batches, make_trainer
from models import GuideCNN
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch import Tensor, nn
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy

from lightning_cco import CCOCallback, CCOWarning, QuantizedModel, capture_graph, plan_quantization, quantize
from lightning_cco.drawing.node_label import BLUE, GREEN, YELLOW
from lightning_cco.monitoring import Monitor
from lightning_cco.monitoring.epoch import EpochMetrics, EpochResults
from lightning_cco.monitoring.heat_map import heat_map
from lightning_cco.monitoring.metric_modes import metric_directions
from lightning_cco.monitoring.plan_log import plan_lines
from lightning_cco.monitoring.resolved import resolved_yaml
from lightning_cco.monitoring.summary_text import summary_text
from lightning_cco.monitoring.tables import float_layers, metrics_table, parsed_layers, sensitivity_table, suggestion_lines
from lightning_cco.settings import load_settings
from lightning_cco.suggestions import Suggestion


@pytest.fixture(scope="module")
def quantized() -> QuantizedModel:
    torch.manual_seed(0)
    model, x = GuideCNN().eval(), GuideCNN.example()
    found = quantize(model, {"layer_settings": [{"match": "conv_1", "skip_quantization": True}]}, (x,))
    found.calibrate([(x,)])
    return found


def show_epochs(monitor: Monitor, quantized: QuantizedModel, epochs: int = 2) -> None:
    report = quantized.sensitivity([(GuideCNN.example(),)])
    monitor.on_start(quantized.graph, quantized.plan)
    for epoch in range(epochs):
        metrics = EpochMetrics({"val_loss": 1.0 / (epoch + 1)}, {"val_loss": 2.0})
        monitor.on_epoch(EpochResults(epoch, 10 * epoch, quantized.plan, quantized.settings, report, metrics))
    monitor.finish()


def test_the_log_says_what_the_guides_log_says() -> None:
    plan = plan_quantization(capture_graph(GuideCNN(), GuideCNN.example()))
    lines = plan_lines(plan)
    assert "Skipped Quantization automatically for the Tail of the model: 'linear_1'" in lines
    assert "# of all Layers      : 10" in lines
    assert "# of Quantized Layers: 9" in lines
    assert "'conv_1': using 8 bits for Weight Quantization" in lines
    assert "INT8 → float: from 'relu_2' to 'linear_1'" in lines
    assert ["conv2", "conv_1", "conv"] in [line.split() for line in parsed_layers(plan.graph).splitlines()]


def test_skips_are_in_the_log_with_their_reasons(quantized: QuantizedModel) -> None:
    assert any(
        line.startswith("Not quantized (setting: skip_quantization: true") and line.endswith("conv_1")
        for line in plan_lines(quantized.plan)
    )


def test_many_layers_share_lines() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(50)))
    lines = plan_lines(plan_quantization(capture_graph(model, torch.ones(1, 2))))
    assert sum("Weight Quantization" in line for line in lines) == 1
    assert "[0-48] × 49" in next(line for line in lines if "8 bits" in line)


def test_dropout_is_not_counted_and_not_called_float() -> None:
    plan = plan_quantization(capture_graph(GuideCNN(), GuideCNN.example()))
    assert "Not counted (not part of the deployed model): dropout, dropout_1" in plan_lines(plan)
    assert [line.split()[0] for line in float_layers(plan).splitlines()[2:]] == ["linear_1"]


def test_inputs_are_named_by_their_argument(quantized: QuantizedModel) -> None:
    assert ["(argument", "0)", "input_0", "input"] in [line.split() for line in parsed_layers(quantized.graph).splitlines()]


def cells(table: str, name: str) -> list[str]:
    """The cells of a metric's row."""
    return re.split(r"\s{2,}", next(line for line in table.splitlines() if line.startswith(name)))


def test_metrics_table() -> None:
    extremes = {"acc": {"lowest": 0.5, "lowest_epoch": 0, "highest": 0.9, "highest_epoch": 2}}
    extremes |= {"loss": {"lowest": 1.0, "lowest_epoch": 1, "highest": 4.0, "highest_epoch": 0}}
    extremes |= {"odd": {"lowest": 1.0, "lowest_epoch": 3, "highest": 2.0, "highest_epoch": 0}}
    values, original, previous = {"acc": 0.75, "loss": 3.0, "odd": 1.0}, {"acc": 0.5, "loss": 2.0}, {"acc": 0.9, "loss": 3.0}
    table = metrics_table(EpochMetrics(values, original, directions={"acc": "max", "loss": "min"}), previous, extremes)
    assert cells(table, "acc") == ["acc", "0.75", "0.5", "+0.25 (+50.0%) better", "-0.15", "0.9 (epoch 2)"]
    assert cells(table, "loss") == ["loss", "3", "2", "+1 (+50.0%) worse", "0", "1 (epoch 1)"]
    assert cells(table, "odd") == ["odd", "1", "-", "-", "-", "1 to 2 (range)"]


class Watched(Classifier):
    """Logs metrics whose better end is known in one way each."""

    def __init__(self) -> None:
        super().__init__()
        self.agreement, self.distance = MulticlassAccuracy(10), MeanSquaredError()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("agreement", self.agreement.to(logits.device))
        self.agreement.update(logits, batch[1])
        self.log("distance", self.distance)
        self.distance.update(logits.sum(-1), batch[1].float())
        self.log_dict({"val_loss": logits.mean(), "watched": logits.mean(), "plateau": logits.mean(), "unknown": logits.mean()})

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "plateau"}}


def test_which_end_is_better_comes_from_monitors_metrics_and_names(tmp_path: Path) -> None:
    found = {}

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            found.update(metric_directions(trainer, trainer.callback_metrics))

    trainer = make_trainer(tmp_path, Look(), EarlyStopping("watched", mode="max"))
    trainer.fit(Watched(), batches(), batches())
    assert found == {"agreement": "max", "distance": "min", "watched": "max", "plateau": "max", "val_loss": "min", "train_loss": "min"}


def test_the_log_of_an_epoch_says_what_is_better(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cco = CCOCallback({"training_settings": {"stats_steps": 1}, "monitoring_settings": {"draw_graph": False}})
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        make_trainer(tmp_path, cco, max_epochs=2).fit(Classifier(), batches(), batches())
    row = cells(caplog.text.rpartition("Summary of epoch 1")[2], "val_loss")
    assert float(row[2]) == pytest.approx(cco.original_metrics["val_loss"], rel=1e-3)
    assert float(row[3]) == pytest.approx(cco.calibrated_metrics["val_loss"], rel=1e-3)
    assert re.search(r"(better|worse)$", row[4])
    assert row[5] != "-"
    assert "(epoch " in row[6]
    assert "Suggested skips: none; no quantized layer has a QS above 10,000 or a relative error above 0.5." in caplog.text


def test_suggestions_in_the_log_say_what_to_do_and_end() -> None:
    many = [Suggestion(f"conv_{i}", 2e4, 0.5, 3.0, "it is large") for i in range(12)]
    lines = suggestion_lines(many, load_settings())
    assert "merge suggested_skips.yaml" in lines[0]
    assert lines[-1].strip() == "… and 2 more"
    assert "from the next epoch on" in suggestion_lines(many, load_settings("w8a8_auto_skip"))[0]
    unset = {"quantization_sensitivity_threshold": None, "quantization_sensitivity_relative_threshold": None}
    no_threshold = {"global_quantization_settings": unset}
    assert "no threshold" in suggestion_lines([], load_settings(no_threshold))[0]
    assert "relative error above 0.33" in suggestion_lines([], load_settings("w8a8_auto_skip"))[0]


def test_the_resolved_recipe_is_a_text_to_read_and_to_feed_back(quantized: QuantizedModel) -> None:
    text = resolved_yaml(quantized.plan)
    assert load_settings(yaml.safe_load(text)) == quantized.plan.resolved_settings()
    lines = text.splitlines()
    assert "  - {match: conv, weights_num_bits: 8}  # conv1: quantized" in lines
    skipped = next(line for line in lines if "match: conv_1," in line)
    assert re.search(r"skip_quantization: true.*# conv2: not quantized, setting: ", skipped)
    assert any("match: linear_1, skip_quantization: true}  # fc2: not quantized, tail: " in line for line in lines)


def test_sensitivity_table_is_sorted_and_says_what_it_leaves_out(quantized: QuantizedModel) -> None:
    report = quantized.sensitivity([(GuideCNN.example(),)])
    table = sensitivity_table(report, quantized.plan, most=2).splitlines()
    assert table[3].split()[0] == report.worst_first()[0].name
    assert f"and {len(report.local) - 2} less sensitive" in table[-1]


@pytest.mark.filterwarnings("ignore:.*no layer is quantized")
def test_where_no_layer_is_quantized_the_table_says_so() -> None:
    found = quantize(GuideCNN(), {"layer_settings": [{"match": "*", "skip_quantization": True}]}, (GuideCNN.example(),))
    found.calibrate([(GuideCNN.example(),)])
    table = sensitivity_table(found.sensitivity([(GuideCNN.example(),)]), found.plan)
    assert "no layer is quantized" in table
    assert len(table.splitlines()) == 1


def test_files(quantized: QuantizedModel, tmp_path: Path) -> None:
    show_epochs(Monitor(tmp_path / "cco"), quantized)
    written = {path.name for path in (tmp_path / "cco").iterdir()}
    pictures = {f"{stem}.{ending}" for stem in ("model_init", "model_post_preprocessing") for ending in ("svg", "png", "dot")}
    assert written == pictures | {
        "overview.svg",
        "overview.png",
        "layers.txt",
        "resolved_recipe.yaml",
        "suggested_skips.yaml",
        "sensitivity.csv",
        "heat_map.png",
        "report.html",
        "report.json",
        "model_explorer.json",
        "model_explorer_data.json",
    }
    with Image.open(tmp_path / "cco" / "model_post_preprocessing.png") as picture:
        assert picture.width > 200
    rows = (tmp_path / "cco" / "sensitivity.csv").read_text().splitlines()
    assert rows[0].startswith("epoch,layer,module,qs")
    assert {row.split(",")[0] for row in rows[1:]} == {"0", "1"}


def test_a_disabled_monitor_writes_nothing(quantized: QuantizedModel, tmp_path: Path) -> None:
    show_epochs(Monitor(tmp_path / "cco", enabled=False), quantized)
    assert not (tmp_path / "cco").exists()


def test_history_goes_on_after_a_resume(quantized: QuantizedModel, tmp_path: Path) -> None:
    first, second = Monitor(tmp_path, draw=False), Monitor(tmp_path, draw=False)
    show_epochs(first, quantized)
    second.load_state_dict(first.state_dict())
    report = quantized.sensitivity([(GuideCNN.example(),)])
    second.on_epoch(EpochResults(2, 20, quantized.plan, quantized.settings, report, EpochMetrics({"val_loss": 3.0})))
    assert [epoch for epoch, _ in second.past.epochs] == [0, 1, 2]
    assert second.past.extremes["val_loss"] == {"lowest": 0.5, "lowest_epoch": 1, "highest": 3.0, "highest_epoch": 2}
    assert {row.split(",")[0] for row in (tmp_path / "sensitivity.csv").read_text().splitlines()[1:]} == {"0", "1", "2"}


@pytest.mark.parametrize("layers", [0, 1, 5, 200])
@pytest.mark.parametrize("epochs", [1, 100])
def test_heat_map_of_any_size(layers: int, epochs: int) -> None:
    history = [(epoch, {f"layer_{i}": 10.0 ** (i % 7) for i in range(layers)}) for epoch in range(epochs)]
    image = heat_map(history, 1000.0)
    assert image.width < 3000
    assert image.height < 1500


def test_heat_map_colours_follow_the_values() -> None:
    history = [(0, {"low": 0.01, "high": 900.0, "float": 3.0}), (1, {"low": 0.01, "high": 900.0})]

    def colours(threshold: float | None, **more: float) -> set[tuple[int, ...]]:
        pixels = np.asarray(heat_map([*history, (2, {"low": 0.01, "high": 900.0, **more})], threshold)).reshape(-1, 3)
        return {tuple(pixel) for pixel in np.unique(pixels, axis=0)}

    red = (198, 40, 40)
    assert {(240, 246, 252), (24, 66, 122), (228, 228, 228)} <= colours(1000.0)  # lowest, highest, not measured
    assert red not in colours(1000.0)
    assert red not in colours(None)
    assert red in colours(800.0)
    assert red in colours(None, broken=float("nan"))


def test_heat_map_explains_no_scale_where_every_cell_is_red() -> None:
    red = heat_map([(0, {"conv": 2e18, "linear": 3e18})], threshold=1000.0)
    colours = {tuple(pixel) for pixel in np.asarray(red).reshape(-1, 3)}
    assert not any(blue > red + 40 for red, _, blue in ((int(r), int(g), int(b)) for r, g, b in colours))


def test_heat_map_shows_the_modules() -> None:
    history = [(0, {"conv": 1.0, "linear": 2.0})]
    without, short = heat_map(history), heat_map(history, paths={"conv": "stem.0", "linear": "head"})
    deep = ".".join(f"stage{n}" for n in range(100))
    assert without.width <= short.width < heat_map(history, paths={"conv": deep, "linear": "head"}).width < 1000
    assert (np.asarray(short)[-40:, :40] < 200).any()  # paths, at the left


def test_heat_map_marks_what_is_suggested() -> None:
    history = [(0, {"conv": 1.0, "linear": 2.0})]
    assert (np.asarray(heat_map(history)) != np.asarray(heat_map(history, suggested={"conv"}))).any()


@pytest.fixture(scope="module")
def run_with_tensorboard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensorboard")
    cco = CCOCallback({"training_settings": {"stats_steps": 1}})
    make_trainer(folder, cco, max_epochs=2, logger=TensorBoardLogger(folder, name="", version="")).fit(Classifier(), batches(), batches())
    return folder


def test_tensorboard_events(run_with_tensorboard: Path) -> None:
    events = EventAccumulator(str(run_with_tensorboard), {"images": 0, "tensors": 0, "scalars": 0, "histograms": 0}).Reload()
    tags = events.Tags()
    assert set(tags["images"]) == {"cco-details/graph", "cco-details/heat_map", "cco-details/model_init", "cco/1_overview"}
    curves = [tag for tag in tags["scalars"] if tag.startswith("cco-qs/")]
    assert len(curves) == 14  # one for each measured layer
    steps = [event.step for event in events.Scalars("val_loss")]
    assert [event.step for event in events.Scalars("cco-qs/batch_norm_2")] == steps == [3, 7]
    assert [event.step for event in events.Images("cco-details/heat_map")] == steps
    beside = EventAccumulator(str(run_with_tensorboard / "float")).Reload()
    assert {(event.step, event.value) for event in beside.Scalars("val_loss")} == {
        (step, beside.Scalars("val_loss")[0].value) for step in (0, 3, 7)
    }
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    known = {*tags["scalars"], "cco-oscillating_weights/conv"}  # which a third epoch brings
    for category in layout.category:
        for chart in category.chart:
            assert any(re.search(pattern, tag) for pattern in chart.multiline.tag for tag in known), chart.title
    assert {"cco/qs_max", "cco/qs_mean", "cco/sqnr_min", "cco/num_quantized_layers", "cco/num_suggested_skips"} <= set(tags["scalars"])
    assert {"cco-details/sensitivity/text_summary", "cco/2_suggestions/text_summary"} <= set(tags["tensors"])
    assert tags["histograms"] == ["cco-details/qs"]
    picture = Image.open(io.BytesIO(events.Images("cco-details/graph")[-1].encoded_image_string))
    # Green, yellow and blue: quantized, not, input or output.
    colours = {"#{:02X}{:02X}{:02X}".format(*pixel) for pixel in np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)}
    assert {BLUE.fill, GREEN.fill, YELLOW.fill} <= colours
    text = events.Tensors("cco-details/sensitivity/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "| adaptive_avg_pool | net.pool |" in text
    graph = GraphDef.FromString(events.Graph().SerializeToString())
    nodes = {node.name: node for node in graph.node}
    boxes = {name.split("/")[0] for name in nodes}  # the page opens with these, closed
    assert 5 <= len(boxes) <= 22
    conv, fc, add, norm, relu = (
        next(node for node in graph.node if node.name.split("/")[-1] == name)
        for name in ("conv_1", "linear", "add", "batch_norm_2", "relu")
    )
    assert conv.attr["quantized"].b
    assert conv.attr["module"].s == b"net.blocks.0.conv1"
    assert not fc.attr["quantized"].b
    assert list(add.input) == [norm.name, relu.name]


def test_tensorboard_opens_on_what_is_looked_at_first(run_with_tensorboard: Path) -> None:
    events = EventAccumulator(str(run_with_tensorboard), {"images": 0, "tensors": 0, "scalars": 0}).Reload()
    tags = events.Tags()

    def order(tag: str) -> list[tuple[int, int]]:
        """As TensorBoard compares tags (``compareTagNames``): numbers by value; slashes, underscores and digits before all other signs."""
        return [(0, int(sign)) if sign.isdigit() else (0, 0) if sign in "/_" else (1, ord(sign)) for sign in tag]

    for page, first in (("images", "cco/1_overview"), ("tensors", "cco/1_summary/text_summary")):
        assert min((tag for tag in tags[page] if tag.startswith("cco")), key=order) == first
    ours = [tag for tag in tags["scalars"] if tag.startswith("cco")]
    assert sorted(ours, key=order)[0].startswith("cco/")
    summary = events.Tensors("cco/1_summary/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "of 6 layers with weights run in INT8" in summary
    assert "| metric | original | calibrated | now | best |" in summary
    (row,) = (line for line in summary.splitlines() if line.startswith("| val_loss |"))
    assert float(row.split("|")[4]) == pytest.approx(events.Scalars("val_loss")[-1].value, rel=1e-3)
    assert "for the Tail of the model: 'linear'" in summary
    assert "Suggested skips: " in summary
    assert [line for line in summary.splitlines() if re.match(r"[-\s]*#", line)] == [
        "### What is quantized, and what is not",
        "### The most sensitive layers",
    ]


def test_long_paths_leave_width_for_the_figures() -> None:
    name = "a_module_of_a_pretrained_network_with_a_long_name"
    body = nn.Sequential(OrderedDict({name: nn.Sequential(OrderedDict({name: nn.Linear(4, 4)}))}))
    quantized = quantize(nn.Sequential(body, nn.ReLU(), nn.Linear(4, 2)), "w8a8", example_args=(torch.randn(3, 4),))
    quantized.calibrate([torch.randn(3, 4)])
    results: Any = SimpleNamespace(
        plan=quantized.plan,
        report=quantized.sensitivity([torch.randn(3, 4)]),
        epoch=0,
        metrics=SimpleNamespace(values={}),
        suggestions=[],
        settings=load_settings("w8a8"),
    )
    table = summary_text(results, {}).partition("### The most sensitive layers")[2]
    (row,) = (line for line in table.splitlines() if line.startswith("| linear |"))
    shown = row.split("|")[2].strip().replace("\\", "")
    assert shown == f"…{name}"


@pytest.mark.slow
def test_tensorboard_server(run_with_tensorboard: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run_with_tensorboard), "--port", str(port), "--load_fast=false"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ask(path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/{path}", timeout=10) as answer:
            return answer.read()

    try:
        for _ in range(120):
            try:
                if json.loads(ask("plugin/images/tags")):
                    break
            except OSError:
                pass
            time.sleep(0.5)
        assert set(json.loads(ask("plugin/images/tags"))["."]) == {
            "cco-details/graph",
            "cco-details/heat_map",
            "cco-details/model_init",
            "cco/1_overview",
        }
        assert "cco/qs_max" in json.loads(ask("plugin/scalars/tags"))["."]
        listed = json.loads(ask("plugin/images/images?run=.&tag=cco-details/graph&sample=0"))
        picture = ask(f"plugin/images/individualImage?{listed[-1]['query']}")
        assert Image.open(io.BytesIO(picture)).format == "PNG"
        assert b"blocks.0.conv1/conv_1" in ask(
            "plugin/graphs/graph?run=.&conceptual=false&limit_attr_size=1024&large_attrs_key=_too_large_attrs"
        )
    finally:
        server.terminate()
        server.wait(10)


def test_csv_logger_gets_the_same_columns_from_the_first_epoch_on(tmp_path: Path) -> None:
    cco = CCOCallback({"training_settings": {"stats_steps": 1}, "monitoring_settings": {"draw_graph": False}})
    make_trainer(tmp_path, cco, max_epochs=2, logger=CSVLogger(tmp_path, name="", version="")).fit(Classifier(), batches())
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert "cco/qs_max" in rows[0]
    assert len([row for row in rows[1:] if row.split(",")[rows[0].split(",").index("cco/qs_max")]]) == 2


def as_lightnings(logger: type, method: str, *arguments: Any, **more: Any) -> dict[str, Any]:
    """The arguments by the names that Lightning's own logger has for them; a TypeError if it would not take them."""
    bound = inspect.signature(getattr(logger, method)).bind(None, *arguments, **more)
    return bound.arguments


class WandbLogger:
    """Stands in for Lightning's, which needs wandb: it takes what that takes."""

    id = "abc1"

    def __init__(self) -> None:
        self.shown: dict[str, Any] = {}
        self.experiment = self
        self.artifacts: list[Any] = []

    def log_artifact(self, artifact: Any) -> None:
        self.artifacts.append(artifact)

    def log_image(self, *arguments: Any, **more: Any) -> None:
        found = as_lightnings(lightning.pytorch.loggers.WandbLogger, "log_image", *arguments, **more)
        self.shown[found["key"]] = found["images"][0].size

    def log_text(self, *arguments: Any, **more: Any) -> None:
        found = as_lightnings(lightning.pytorch.loggers.WandbLogger, "log_text", *arguments, **more)
        self.shown[found["key"]] = found["data"]

    def log_table(self, *arguments: Any, **more: Any) -> None:
        found = as_lightnings(lightning.pytorch.loggers.WandbLogger, "log_table", *arguments, **more)
        assert all(len(row) == len(found["columns"]) for row in found["data"])
        self.shown[found["key"]] = found["data"]

    def log_metrics(self, *arguments: Any, **more: Any) -> None:
        self.shown |= as_lightnings(lightning.pytorch.loggers.WandbLogger, "log_metrics", *arguments, **more)["metrics"]


class MLFlowLogger:
    """Stands in for Lightning's, which needs mlflow."""

    run_id = "run"

    def __init__(self) -> None:
        self.experiment = self
        self.kept: list[str] = []

    def log_artifact(self, run_id: str, local_path: str, artifact_path: str | None = None) -> None:  # as MlflowClient has it
        assert Path(local_path).exists()
        self.kept.append(Path(local_path).name)


class Artifact:
    """As wandb's: a name, a kind, files."""

    def __init__(self, name: str, type: str) -> None:
        self.name, self.type, self.files = name, type, set()

    def add_file(self, local_path: str) -> None:
        assert Path(local_path).exists()
        self.files.add(Path(local_path).name)


class UsersWandbLogger(WandbLogger):
    """A logger derived from a known one."""


def test_wandb_and_mlflow_get_what_they_can_show(quantized: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Histogram=sorted, Artifact=Artifact))
    wandb, mlflow = UsersWandbLogger(), MLFlowLogger()
    show_epochs(Monitor(tmp_path, [wandb, mlflow]), quantized, epochs=1)
    assert {
        "cco-details/graph",
        "cco-details/model_init",
        "cco-details/heat_map",
        "cco-details/sensitivity",
        "cco/2_suggestions",
        "cco-details/qs",
        "cco-qs/conv",
    } <= set(wandb.shown)
    assert {row[0] for row in wandb.shown["cco-details/sensitivity"]} == set(quantized.measured_layers())
    pictures = {f"{stem}.{ending}" for stem in ("model_init", "model_post_preprocessing") for ending in ("svg", "png")}
    assert {"sensitivity.csv", "suggested_skips.yaml", "resolved_recipe.yaml", "heat_map.png"} | pictures <= set(mlflow.kept)
    report = {"report.html", "report.json", "model_explorer.json", "model_explorer_data.json"}
    assert report <= set(mlflow.kept)
    assert {(one.name, one.type, frozenset(one.files)) for one in wandb.artifacts} == {("cco-report-abc1", "cco-report", frozenset(report))}


def test_a_large_net_gets_a_bounded_number_of_curves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Linear(4, 4) for _ in range(60))), torch.randn(2, 4)
    net = quantize(model, None, (x,))
    net.calibrate([(x,)])
    report = net.sensitivity([(x,)])
    monitor = Monitor(tmp_path, draw=False)
    monitor.on_start(net.graph, net.plan)
    monitor.on_epoch(EpochResults(0, 1, net.plan, net.settings, report))
    assert monitor.past.followed == [entry.name for entry in report.worst_first()[:30]]
    again = Monitor(tmp_path, draw=False)
    again.load_state_dict(monitor.state_dict())
    assert again.past.followed == monitor.past.followed


def test_a_logger_that_fails_ends_nothing(quantized: QuantizedModel, tmp_path: Path) -> None:
    class Broken(WandbLogger):
        def log_image(self, **more: Any) -> None:
            raise ConnectionError("no network")

    with pytest.warns(CCOWarning, match=r"Broken could not show.*no network"):
        show_epochs(Monitor(tmp_path, [Broken()], draw=False), quantized, epochs=1)
