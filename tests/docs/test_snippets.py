"""The documentation's Python and YAML run as written there: each page's blocks in order, in one namespace."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import yaml
from models import ResidualCNN
from torch.utils.data import DataLoader, TensorDataset

import lightning_cco as cc

DOCS = Path(__file__).resolve().parents[2] / "docs"
SLOW = (
    "export.md",
    "index.md",
    "engines/openvino.md",
    "engines/tensorrt.md",
    "tutorials/text.md",
    "tutorials/audio.md",
)  # another export like those of engines/ort.md and getting-started.md
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


class LitModel(pl.LightningModule):
    """Stands for the reader's own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ResidualCNN(classes=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


class Data(pl.LightningDataModule):
    """Stands for the reader's own."""

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8) % 4), batch_size=4)

    val_dataloader = train_dataloader


def names_of(page: str) -> dict[str, Any]:
    """What a page's examples take as given."""
    x = ResidualCNN.example()
    given: dict[str, Any] = {"model": LitModel(), "data": Data(), "x": x}
    if page == "export.md":
        given["quantized"] = quantized = cc.quantize(given["model"].eval(), None, (x,))
        quantized.calibrate([x])
        given["cco"] = quantized  # both have the same method
    return given


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # the exporter, about itself
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in PAGES if blocks(page, "python")]
)
def test_the_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.startswith(("engines/", "tutorials/")) or page == "export.md":
        pytest.importorskip("onnxruntime")
    needed = {
        "engines/openvino.md": "openvino",
        "engines/executorch.md": "executorch",
        "engines/litert.md": "litert_torch",
        "engines/coreml.md": "coremltools",
        "engines/qnn.md": "onnxruntime_qnn",
    }
    if page in needed:
        pytest.importorskip(needed[page])
    monkeypatch.chdir(tmp_path)
    found = names_of(page)
    for number, code in enumerate(blocks(page, "python")):
        with warnings.catch_warnings():  # the page on messages changes the filters of the process
            exec(compile(code, f"{page}, block {number}", "exec"), found)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")])
def test_the_yaml_is_a_recipe(page: str) -> None:
    for text in blocks(page, "yaml"):
        settings = cc.load_settings(yaml.safe_load(text))
        if settings.layer_settings:
            cc.plan_quantization(cc.capture_graph(ResidualCNN(), ResidualCNN.example()), settings)
