"""The commands, as somebody types them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import onnx
import pytest
import torch

from lightning_cco import cli
from lightning_cco.version import __version__

PROJECT = """
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

import lightning_cco as cc


class Net(pl.LightningModule):
    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Step(pl.LightningModule):  # no forward: what the step calls is captured
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        self.trainer.global_step  # as steps do that ask for the Trainer
        return nn.functional.cross_entropy(self.head(torch.relu(self.encoder(batch[0]))), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Data(pl.LightningDataModule):
    def __init__(self, count=32):
        super().__init__()
        self.count = count

    def setup(self, stage):
        self.samples = [(torch.randn(6), torch.tensor(number % 2)) for number in range(self.count)]

    def train_dataloader(self):
        return DataLoader(self.samples, 8)


def nothing():
    return []


number = 3
some = [(torch.randn(8, 6), torch.zeros(8, dtype=torch.long)) for _ in range(5)]


def train():
    settings = {"training_settings": {"stats_steps": 2}, "monitoring_settings": {"draw_graph": False, "output_dir": "logs/cco"}}
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    for module, name in ((Step(), "step"), (Net(width=12), "best")):
        callbacks = [cc.CCOCallback(settings), ModelCheckpoint("checkpoints", filename=name)]
        pl.Trainer(max_epochs=1, callbacks=callbacks, **options).fit(module, Data())
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module, a data module, a checkpoint and logs."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "cli_project.py").write_text(PROJECT)
    torch.save(torch.randn(4, 6), folder / "example.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        __import__("cli_project").train()
    sys.modules.pop("cli_project")
    return folder


@pytest.fixture
def run(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(arguments)
        sys.modules.pop("cli_project", None)
        written = capsys.readouterr()
        return status, written.out, written.err

    return call


EXPORT = ("export", "checkpoints/best.ckpt", "--module")


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize(
    "given",
    [
        ["cli_project.Net"],
        ["cli_project:Net", "--data", "cli_project.Data", "--data-arg", "count=16"],
        ["cli_project.py:Net", "--example", "example.pt", "--no-dynamic-batch"],
    ],
)
def test_export(run, tmp_path: Path, given: list[str]) -> None:
    status, said, error = run(*EXPORT, *given, "--out", str(tmp_path / "model.onnx"))
    assert status == 0
    assert error == f"Writing {tmp_path / 'model.onnx'} and checking it; a large model takes minutes.\n"
    assert "runs in INT8        2 " in said
    if "--data" in given:
        assert "(2 batches" in said
    first = onnx.load(tmp_path / "model.onnx").graph.input[0].type.tensor_type.shape.dim[0]
    assert bool(first.dim_value) == ("--no-dynamic-batch" in given)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize(("given", "count"), [([], 2), (["--batches", "4"], 4), (["--batches", "1"], 1)])
@pytest.mark.parametrize(("checkpoint", "module"), [("best", "Net"), ("step", "Step")])
def test_the_file_is_checked_on_as_many_batches(run, tmp_path: Path, checkpoint: str, module: str, given: list[str], count: int) -> None:
    data = ["--data", "cli_project.Data", *given, "--out", str(tmp_path / "model.onnx")]
    status, said, _ = run("export", f"checkpoints/{checkpoint}.ckpt", "--module", f"cli_project.{module}", *data)
    assert status == 0
    assert f"({count} batch{'es' if count > 1 else ''}" in said


def test_export_as_a_program(run, tmp_path: Path) -> None:
    assert run(*EXPORT, "cli_project.Net", "--out", str(tmp_path / "model.pt2"))[0] == 0
    assert torch.export.load(tmp_path / "model.pt2").module()(torch.randn(8, 6)).shape == (8, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "no.ckpt", "--module", "cli_project.Net"), "the checkpoint 'no.ckpt' is not there"),
        ((*EXPORT, "cli_project.Nett"), "has no 'Nett'. Did you mean 'Net'?"),
        ((*EXPORT, "no_such_package.Net"), "can't be imported: ModuleNotFoundError"),
        ((*EXPORT, "Net"), "expected pkg.module.Class"),
        ((*EXPORT, "cli_project.number"), "expected a class of modules, got int"),
        ((*EXPORT, "cli_project.Net", "--arg", "width"), "expected NAME=VALUE"),
        ((*EXPORT, "cli_project.Net", "--arg", "width=1:30"), "1:30 is 90 to YAML"),
        ((*EXPORT, "cli_project.Net", "--arg", "widht=3"), "does not take it. Did you mean 'width'?"),
        ((*EXPORT, "cli_project.Net", "--arg", "width=5"), "can't be built"),
        ((*EXPORT, "cli_project.Net", "--data", "cli_project.nothing"), "expected at least one batch, got none"),
        ((*EXPORT, "cli_project.Net", "--data", "cli_project.Data", "--example", "example.pt"), "got both"),
        ((*EXPORT, "cli_project.Net", "--example", "cli_project.py"), "expected tensors that torch.save wrote"),
        ((*EXPORT, "cli_project.Net", "--data", "cli_project.Data", "--out", "model.safetensors"), "but the plan rounds activations"),
        ((*EXPORT, "cli_project.Net", "--data-arg", "count=16"), "--data-arg count=16: expected --data too"),
        ((*EXPORT, "cli_project.Net", "--batches", "4", "--example", "example.pt"), "--batches 4: expected --data too"),
        ((*EXPORT, "cli_project.Net", "--data", "cli_project.some", "--data-arg", "count=16"), "is no class or function, but list"),
        ((*EXPORT, "cli_project.Net", "--data", "cli_project.some", "--batches", "4", "--out", "model.pt2"), "is not checked on batches"),
        (("report", "nowhere"), "'nowhere' is no folder"),
        (("report", "checkpoints"), "has no resolved_recipe.yaml"),
    ],
)
def test_what_is_said_of_mistakes(run, arguments: tuple[str, ...], message: str) -> None:
    status, _, error = run(*arguments)
    assert status == 1
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("arguments", [(*EXPORT, "cli_project.Net", "--batches", "0"), ("report", "logs", "--most", "-1")])
def test_counts_are_at_least_one(run, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit):
        run(*arguments)
    assert "expected a number of at least 1" in capsys.readouterr().err


def test_the_report_of_a_run(run, project: Path) -> None:
    status, said, _ = run("report", "logs", "--most", "2")
    assert status == 0
    assert "end of epoch 0" in said
    assert "Suggested skips: none" in said
    assert f"Layers: {(project / 'logs/cco/layers.txt').read_text().splitlines()[0]}" in said
    assert "less sensitive layers" in said
    head = next(line for line in said.splitlines() if line.startswith("layer "))  # as the log has it
    assert re.split(r"\s{2,}", head) == ["layer", "module", "QS", "relative", "SQNR dB", "varying dB", "accumulated QS"]
    first = said.splitlines()[said.splitlines().index(head) + 2]
    assert re.fullmatch(r"\S+ +\S+ +\S+ +[\d.]+% +\d+\.\d +\d+\.\d +\S+", first)
    page = next(line for line in said.splitlines() if line.startswith("Page: "))
    assert Path(page.removeprefix("Page: ").partition(" (")[0]).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    (project / "logs/cco/sensitivity.csv").write_bytes((project / "logs/cco/sensitivity.csv").read_bytes() + b"1,torn")
    assert "end of epoch 0" in run("report", "logs/cco")[1]


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"lightning-cco {__version__}\n"
