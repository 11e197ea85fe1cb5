"""The file of a module that has no forward, or one that its step goes past, holds the network of the step; ONNX Runtime agrees with the trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from lightning_modules import quick
from test_network_of_the_step import (
    LABELLED,
    MASKED,
    AutoEncoder,
    Between,
    Finetuning,
    FinetuningForward,
    Segmentation,
    Siamese,
    Step,
    TwoViews,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_cco import CCOCallback


class Samples(Dataset[Any]):
    """Each item of some batches by itself."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        return {key: value[index] for key, value in self.batch.items()} if isinstance(self.batch, dict) else [v[index] for v in self.batch]


def fitted(module: pl.LightningModule, batch: Any, folder: Path) -> CCOCallback:
    cco = quick()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[cco],
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(Samples(batch), 3, collate_fn=None))
    assert cco.quantized.drift == []
    module.eval()
    return cco


def run(path: Path, inputs: dict[str, Tensor]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert {entry.name for entry in session.get_inputs()} == set(inputs)
    return session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})


def close(ours: np.ndarray, theirs: Tensor) -> None:
    error = np.abs(ours - theirs.detach().numpy()).max()
    assert error < 0.02 * float(theirs.abs().max()), error


IMAGES = torch.randn(6, 1, 8, 8)


def test_autoencoder(tmp_path: Path) -> None:
    module = AutoEncoder()
    cco = fitted(module, (IMAGES, torch.zeros(6)), tmp_path)
    cco.export(tmp_path / "a.onnx")
    x = torch.randn(5, 64)  # another batch size than the example's
    with torch.no_grad():
        expected = module.decoder(module.encoder(x).view(-1, 4))
    close(run(tmp_path / "a.onnx", {"input": x})[0], expected)


def test_batches_that_are_mappings(tmp_path: Path) -> None:
    module = Segmentation()
    fitted(module, MASKED, tmp_path).export(tmp_path / "a.onnx")
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        close(run(tmp_path / "a.onnx", {"x": x})[0], module.net(x))
    types = [node.op_type for node in onnx.load(tmp_path / "a.onnx").graph.node]
    assert not {"Softmax", "Log", "ReduceSum", "RandomNormalLike"}.intersection(types)


@pytest.mark.slow
def test_the_second_view_is_the_same_network(tmp_path: Path) -> None:
    module = TwoViews()
    fitted(module, (IMAGES,), tmp_path).export(tmp_path / "a.onnx")
    with torch.no_grad():
        close(run(tmp_path / "a.onnx", {"x": IMAGES})[0], module.net(IMAGES))


@pytest.mark.parametrize("kind", [Finetuning, pytest.param(FinetuningForward, marks=pytest.mark.slow)])
def test_labels_are_no_input(kind: type[Finetuning], tmp_path: Path) -> None:
    module = kind()
    report = fitted(module, LABELLED, tmp_path).export(tmp_path / "a.onnx")
    inputs = {name: LABELLED[name] for name in ("input_ids", "attention_mask")}
    outputs = run(tmp_path / "a.onnx", inputs)
    with torch.no_grad():
        close(outputs[0], module.net(**inputs)["logits"])
    assert len(outputs) == 1
    assert any("labels" in note for note in report.notes)


def test_what_stands_between_the_networks_is_in_the_file(tmp_path: Path) -> None:
    module, extra = Between(), torch.randn(6, 2)
    fitted(module, {"x": IMAGES, "extra": extra}, tmp_path).export(tmp_path / "a.onnx")
    names = {entry.name: entry for entry in onnx.load(tmp_path / "a.onnx").graph.input}
    flat, other = torch.randn(4, 64), torch.randn(4, 2)
    assert "input" in names
    (second,) = set(names) - {"input"}
    with torch.no_grad():
        z = torch.relu(module.encoder(flat) + module.shift)
        close(run(tmp_path / "a.onnx", {"input": flat, second: other})[0], module.decoder(torch.cat([z, other], 1)))


@pytest.mark.slow
def test_two_branches_of_one_network(tmp_path: Path) -> None:
    module = Siamese()
    fitted(module, [IMAGES, IMAGES.flip(-1)], tmp_path).export(tmp_path / "a.onnx")
    one, two = torch.randn(2, 64), torch.randn(2, 64)
    with torch.no_grad():
        expected = module.head(torch.cat([module.encoder(one), module.encoder(two)], 1))
    close(run(tmp_path / "a.onnx", {"input": one, "input_2": two})[0], expected)


class Adversaries(Step):
    """Manual optimization; ``forward`` is the generator."""

    def __init__(self) -> None:
        super().__init__()
        del self.net
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 64))
        self.discriminator = nn.Sequential(nn.Linear(64, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        one, two = self.optimizers()
        fake = self(torch.randn(len(batch[0]), 4))
        for optimizer, loss in (
            (one, -self.discriminator(fake).mean()),
            (two, self.discriminator(torch.cat([batch[0].flatten(1), fake.detach()])).mean()),
        ):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss, retain_graph=True)
            self.untoggle_optimizer(optimizer)
        one.step()
        two.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 1e-3) for part in (self.generator, self.discriminator)]


class AdversariesWithoutForward(Adversaries):
    forward = pl.LightningModule.forward

    def training_step(self, batch: Any, batch_idx: int) -> None:
        one, two = self.optimizers()
        fake = self.generator(torch.randn(len(batch[0]), 4))
        self.manual_backward(-self.discriminator(fake).mean() + self.discriminator(batch[0].flatten(1)).mean())
        one.step()
        two.step()


def test_the_file_of_a_generator(tmp_path: Path) -> None:
    module = Adversaries()
    fitted(module, (IMAGES,), tmp_path).export(tmp_path / "a.onnx")
    z = torch.randn(5, 4)
    with torch.no_grad():
        close(run(tmp_path / "a.onnx", {"z": z})[0], module(z))


def test_adversaries_without_a_forward(tmp_path: Path) -> None:
    module = AdversariesWithoutForward()
    cco = fitted(module, (IMAGES,), tmp_path)
    cco.export(tmp_path / "a.onnx")
    z = torch.randn(5, 4)
    with torch.no_grad():
        close(run(tmp_path / "a.onnx", {"input": z})[0], module.discriminator(module.generator(z)))
    program = cco.export(tmp_path / "a.pt2")
    with torch.no_grad():
        close(program.module()(z)[0].detach().numpy(), module.discriminator(module.generator(z)))
