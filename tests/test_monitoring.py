"""What a user sees is there: tables, files, TensorBoard's pages, and nothing that ends a training."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning_modules import Classifier, batches, make_trainer
from models import GuideCNN
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.graph_pb2 import GraphDef

from lightning_cco import CCOCallback, CCOWarning, QuantizedModel, capture_graph, plan_quantization, quantize
from lightning_cco.graph.node_label import BLUE, GREEN, YELLOW
from lightning_cco.monitoring import Monitor
from lightning_cco.monitoring.heat_map import heat_map
from lightning_cco.monitoring.tables import metrics_table, parsed_layers, plan_lines, sensitivity_table


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
        monitor.on_epoch(
            epoch, 10 * epoch, quantized.plan, report, [], quantized.settings, {"val_loss": 1.0 / (epoch + 1)}, {"val_loss": 2.0}
        )
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


def test_metrics_table() -> None:
    extremes = {
        "acc": {"lowest": 0.5, "lowest_epoch": 0, "highest": 0.9, "highest_epoch": 2},
        "new": dict.fromkeys(("lowest", "highest"), 1.0),
    }
    extremes["new"] |= {"lowest_epoch": 3, "highest_epoch": 3}
    table = metrics_table(3, {"acc": 0.75, "new": 1.0}, {"acc": 0.5}, extremes)
    row = next(line for line in table.splitlines() if line.startswith("acc"))
    assert row.split()[:3] == ["acc", "0.75", "0.5"]
    assert "↗ +0.25 (+50.0%)" in row
    assert "0.9 (epoch 2)" in row
    assert next(line for line in table.splitlines() if line.startswith("new")).split()[2:4] == ["-", "-"]


def test_sensitivity_table_is_sorted_and_says_what_it_leaves_out(quantized: QuantizedModel) -> None:
    report = quantized.sensitivity([(GuideCNN.example(),)])
    table = sensitivity_table(report, quantized.plan, most=2).splitlines()
    assert table[2].split()[0] == report.worst_first()[0].name
    assert f"and {len(report.local) - 2} less sensitive" in table[-1]


def test_files(quantized: QuantizedModel, tmp_path: Path) -> None:
    show_epochs(Monitor(tmp_path / "cco"), quantized)
    written = {path.name for path in (tmp_path / "cco").iterdir()}
    pictures = {f"{stem}.{ending}" for stem in ("model_init", "model_post_preprocessing") for ending in ("svg", "png", "dot")}
    assert written == pictures | {"resolved_recipe.yaml", "suggested_skips.yaml", "sensitivity.csv", "heat_map.png"}
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
    second.on_epoch(2, 20, quantized.plan, report, [], quantized.settings, {"val_loss": 3.0}, {})
    assert [epoch for epoch, _ in second.history] == [0, 1, 2]
    assert second.extremes["val_loss"] == {"lowest": 0.5, "lowest_epoch": 1, "highest": 3.0, "highest_epoch": 2}
    assert {row.split(",")[0] for row in (tmp_path / "sensitivity.csv").read_text().splitlines()[1:]} == {"0", "1", "2"}


@pytest.mark.parametrize("layers", [0, 1, 5, 200])
@pytest.mark.parametrize("epochs", [1, 100])
def test_heat_map_of_any_size(layers: int, epochs: int) -> None:
    history = [(epoch, {f"layer_{i}": 10.0 ** (i % 7) for i in range(layers)}) for epoch in range(epochs)]
    image = heat_map(history, 1000.0)
    assert image.width < 3000
    assert image.height < 1500


def test_heat_map_colours_follow_the_values() -> None:
    image = np.asarray(heat_map([(0, {"cold": 0.01, "hot": 1e5, "broken": float("nan")})], None)).reshape(-1, 3)
    for colour in ((232, 244, 233), (198, 40, 40)):
        assert (image == colour).all(axis=1).any()


@pytest.fixture(scope="module")
def run_with_tensorboard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensorboard")
    cco = CCOCallback({"training_settings": {"stats_steps": 1}})
    make_trainer(folder, cco, max_epochs=2, logger=TensorBoardLogger(folder, name="", version="")).fit(Classifier(), batches(), batches())
    return folder


def test_tensorboard_events(run_with_tensorboard: Path) -> None:
    events = EventAccumulator(str(run_with_tensorboard), {"images": 0, "tensors": 0, "scalars": 0, "histograms": 0}).Reload()
    tags = events.Tags()
    assert set(tags["images"]) == {"cco/graph", "cco/heat_map"}
    assert {"cco/qs_max", "cco/qs_mean", "cco/sqnr_min", "cco/num_quantized_layers", "cco/num_suggested_skips"} <= set(tags["scalars"])
    assert {"cco/sensitivity/text_summary", "cco/suggestions/text_summary"} <= set(tags["tensors"])
    assert tags["histograms"] == ["cco/qs"]
    picture = Image.open(io.BytesIO(events.Images("cco/graph")[-1].encoded_image_string))
    # Green, yellow and blue: quantized, not, input or output.
    colours = {"#{:02X}{:02X}{:02X}".format(*pixel) for pixel in np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)}
    assert {BLUE.fill, GREEN.fill, YELLOW.fill} <= colours
    text = events.Tensors("cco/sensitivity/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "| adaptive_avg_pool | net.pool |" in text
    graph = GraphDef.FromString(events.Graph().SerializeToString())
    nodes = {node.name: node for node in graph.node}
    assert nodes["net/blocks/0/conv1/conv_1"].attr["quantized"].b
    assert not nodes["net/fc/linear"].attr["quantized"].b
    assert list(nodes["net/blocks/0/add"].input) == ["net/blocks/0/bn2/batch_norm_2", "net/relu/relu"]


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
        assert set(json.loads(ask("plugin/images/tags"))["."]) == {"cco/graph", "cco/heat_map"}
        assert "cco/qs_max" in json.loads(ask("plugin/scalars/tags"))["."]
        listed = json.loads(ask("plugin/images/images?run=.&tag=cco/graph&sample=0"))
        picture = ask(f"plugin/images/individualImage?{listed[-1]['query']}")
        assert Image.open(io.BytesIO(picture)).format == "PNG"
        assert b"net/blocks/0/add" in ask(
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


class WandbLogger:
    """Stands in for Lightning's, by name and methods."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.shown.append(key)

    def log_text(self, key: str, columns: list[str], data: list[list[str]], step: int) -> None:
        self.shown.append(key)


class MLFlowLogger:
    """Stands in for Lightning's."""

    run_id = "run"

    def __init__(self) -> None:
        self.experiment = self
        self.kept: list[str] = []

    def log_artifact(self, run_id: str, path: str, artifact_path: str) -> None:
        assert Path(path).exists()
        self.kept.append(Path(path).name)


def test_wandb_and_mlflow_get_what_they_can_show(quantized: QuantizedModel, tmp_path: Path) -> None:
    wandb, mlflow = WandbLogger(), MLFlowLogger()
    show_epochs(Monitor(tmp_path, [wandb, mlflow]), quantized, epochs=1)
    assert {"cco/graph", "cco/heat_map", "cco/sensitivity", "cco/suggestions"} <= set(wandb.shown)
    assert {"sensitivity.csv", "suggested_skips.yaml", "model_post_preprocessing.svg"} <= set(mlflow.kept)


def test_a_logger_that_fails_ends_nothing(quantized: QuantizedModel, tmp_path: Path) -> None:
    class Broken(WandbLogger):
        def log_image(self, **more: Any) -> None:
            raise ConnectionError("no network")

    Broken.__name__ = "WandbLogger"
    with pytest.warns(CCOWarning, match=r"WandbLogger.*no network"):
        show_epochs(Monitor(tmp_path, [Broken()], draw=False), quantized, epochs=1)
