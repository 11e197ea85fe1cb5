"""The next day: a compressed model out of its checkpoint, without a Trainer. The reference is the model as it was when the training ended."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import onnxruntime
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import Classifier, batches, make_trainer, quick
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_cco as cc


class StepOnly(pl.LightningModule):
    """No forward: the step calls encoder and head, on a batch that is a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16)), nn.Linear(16, 3)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert self.trainer is not None
        return nn.functional.cross_entropy(self.head(torch.relu(self.encoder(batch["x"]))), batch["y"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def mappings() -> list[dict[str, Tensor]]:
    numbers = torch.Generator().manual_seed(5)
    return [{"x": torch.randn(8, 8, generator=numbers), "y": torch.randint(0, 3, (8,), generator=numbers)} for _ in range(4)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Tensor, Tensor]]:
    """A checkpoint; images; and what the compressed model makes of them."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    model, saving = Classifier(), ModelCheckpoint(folder, filename="best")
    make_trainer(folder, quick(), saving, max_epochs=1).fit(model, batches())
    images = next(iter(batches()))[0]
    with torch.no_grad():
        yield saving.best_model_path, images, model.eval()(images)


@pytest.mark.parametrize("how", ["example", "batch", "shapes"])
def test_it_computes_what_the_training_ended_with(trained: tuple[str, Tensor, Tensor], how: str) -> None:
    path, images, expected = trained
    given: dict[str, Any] = {"example": {"example_args": (images,)}, "batch": {"batch": next(iter(batches()))}, "shapes": {}}[how]
    model = Classifier()
    quantized = cc.load_quantized(model, path, **given)
    with torch.no_grad():
        assert torch.equal(model(images), expected)
    assert not model.training
    assert quantized.uncalibrated == []
    quantized.remove()
    with torch.no_grad():
        assert not torch.equal(model(images), expected)


def test_the_network_inside_of_the_module(trained: tuple[str, Tensor, Tensor]) -> None:
    path, images, expected = trained
    net = Classifier().net
    cc.load_quantized(net, path, (images,))
    with torch.no_grad():
        assert torch.equal(net(images), expected)


def test_the_example_that_the_module_gives(trained: tuple[str, Tensor, Tensor]) -> None:
    path, images, _ = trained
    model = Classifier()
    model.example_input_array = images[:3]
    quantized = cc.load_quantized(model, path)
    assert quantized.example[0][0] is model.example_input_array


def test_an_example_that_the_module_does_not_take_is_blamed(trained: tuple[str, Tensor, Tensor]) -> None:
    path, images, _ = trained
    model = Classifier()
    model.example_input_array = images[:, :, None]
    with pytest.raises(
        cc.CCOError, match=r"Classifier.example_input_array is not what its forward takes: expected \[.*, as in the training, got \["
    ):
        cc.load_quantized(model, path)


@pytest.mark.parametrize("kind", ["right", "wrong", "mapping", "none"])
def test_a_wrong_example_is_said_when_the_training_starts(kind: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model, data = Classifier(), batches()
    x = next(iter(data))[0]
    made: dict[str, Any] = {"right": x[:2], "wrong": x[:, :, None], "mapping": {"x": x[:2]}, "none": None}
    model.example_input_array = made[kind]
    cco = cc.CCOCallback({"training_settings": {"stats_steps": 1}, "monitoring_settings": {"draw_graph": False}})
    warnings.simplefilter("always")
    make_trainer(tmp_path, cco, max_steps=1).fit(model, data)
    said = [str(one.message) for one in recwarn if "example_input_array" in str(one.message)]
    assert len(said) == (kind == "wrong")
    for one in said:
        assert str(list(x.shape)) in one
        assert str(list(x[:, :, None].shape)) in one


def test_it_is_exported(trained: tuple[str, Tensor, Tensor], tmp_path: Path) -> None:
    path, images, expected = trained
    cc.load_quantized(Classifier(), path, images).export(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (out,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), expected, rtol=0.05, atol=0.02)


def test_a_module_without_a_forward(tmp_path: Path) -> None:
    model, saving = StepOnly(), ModelCheckpoint(tmp_path, filename="best")
    make_trainer(tmp_path, quick(), saving, max_epochs=1).fit(model, DataLoader(mappings(), batch_size=None))
    with torch.no_grad():
        expected = model.head(torch.relu(model.encoder(mappings()[0]["x"])))
    with pytest.raises(cc.CCOError, match="StepOnly has no forward of its own"):
        cc.load_quantized(StepOnly(), saving.best_model_path)
    fresh = StepOnly()
    quantized = cc.load_quantized(fresh, saving.best_model_path, batch=mappings()[0])
    report = quantized.export(tmp_path / "model.onnx")
    assert report.sqnr_db > 30
    assert fresh._trainer is None
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (out,) = session.run(None, {session.get_inputs()[0].name: mappings()[0]["x"].numpy()})
    torch.testing.assert_close(torch.from_numpy(out), expected, rtol=0.1, atol=0.1)


def test_weights_of_a_compiled_module(trained: tuple[str, Tensor, Tensor], tmp_path: Path) -> None:
    path, images, expected = trained
    saved = torch.load(path, weights_only=True)
    saved["state_dict"] = {name.replace("net.", "net._orig_mod.", 1): value for name, value in saved["state_dict"].items()}
    torch.save(saved, tmp_path / "compiled.ckpt")
    model = Classifier()
    cc.load_quantized(model, tmp_path / "compiled.ckpt", (images,))
    with torch.no_grad():
        assert torch.equal(model(images), expected)


class Renaming(Classifier):
    """Reads checkpoints whose names begin otherwise, and leaves a part out of them, as Lightning lets a module do."""

    def __init__(self) -> None:
        super().__init__()
        self.left_out, self.strict_loading = nn.Linear(2, 2), False

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {name.removeprefix("old."): value for name, value in checkpoint["state_dict"].items()}


@pytest.mark.filterwarnings("ignore:.*left_out")
def test_weights_that_a_module_reads_in_its_own_way(trained: tuple[str, Tensor, Tensor], tmp_path: Path) -> None:
    path, images, expected = trained
    saved = torch.load(path, weights_only=True)
    saved["state_dict"] = {f"old.{name}": value for name, value in saved["state_dict"].items()}
    torch.save(saved, tmp_path / "old.ckpt")
    model = Renaming()
    cc.load_quantized(model, tmp_path / "old.ckpt", (images,))
    with torch.no_grad():
        assert torch.equal(model(images), expected)


def test_another_recipe_is_planned_anew_and_said(trained: tuple[str, Tensor, Tensor], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    path, images, _ = trained
    recipe = {"layer_settings": [{"match": "input_0", "skip_quantization": True}, {"match": "conv", "skip_quantization": True}]}
    quantized = cc.load_quantized(Classifier(), path, (images,), settings=recipe)
    assert "conv" not in quantized.plan.quantized
    assert "no longer quantized: batch_norm, conv, input_0, relu" in caplog.text


class OfOnesOwn:
    """A class that only trusted files may hold."""


def _without_ranges(saved: dict[str, Any]) -> None:
    saved.pop("callbacks")


def _of_a_class(saved: dict[str, Any]) -> None:
    saved["hyper_parameters"] = OfOnesOwn()


def _damaged(saved: dict[str, Any]) -> None:
    state = next(iter(saved["callbacks"].values()))
    next(state for state in saved["callbacks"].values() if "quantized" in state)["quantized"]["version"] = 99
    assert state


def _shapes(saved: dict[str, Any]) -> None:
    state = next(state for state in saved["callbacks"].values() if "quantized" in state)
    state["quantized"]["inputs"]["input_0"]["shape"] = [2**20, 2**20]


def _another_network(saved: dict[str, Any]) -> None:
    saved["state_dict"] = {"other": torch.zeros(3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_ranges, "holds no ranges: it was saved with save_weights_only=True"),
        (_of_a_class, "pass weights_only=False"),
        (_damaged, "is of version 99"),
        (_shapes, "quantized.inputs.input_0.shape': expected a list of sizes"),
        (_another_network, "are not those of Classifier"),
    ],
)
def test_files_that_can_not_be_used(trained: tuple[str, Tensor, Tensor], tmp_path: Path, change: Any, message: str) -> None:
    saved = torch.load(trained[0], weights_only=True)
    change(saved)
    torch.save(saved, tmp_path / "changed.ckpt")
    with pytest.raises(cc.CCOError, match=message):
        cc.load_quantized(Classifier(), tmp_path / "changed.ckpt", (trained[1],))


def test_trusted_files_are_read(trained: tuple[str, Tensor, Tensor], tmp_path: Path) -> None:
    saved = torch.load(trained[0], weights_only=True)
    _of_a_class(saved)
    torch.save(saved, tmp_path / "trusted.ckpt")
    cc.load_quantized(Classifier(), tmp_path / "trusted.ckpt", (trained[1],), weights_only=False)


def test_example_and_batch_are_one_too_many(trained: tuple[str, Tensor, Tensor]) -> None:
    with pytest.raises(cc.CCOError, match="got both"):
        cc.load_quantized(Classifier(), trained[0], (trained[1],), batch=trained[1])
    with pytest.raises(cc.CCOError, match="forward_fn needs the batch"):
        cc.load_quantized(Classifier(), trained[0], (trained[1],), forward_fn=lambda module, batch: module(batch[0]))
    with pytest.raises(cc.CCOError, match="batch needs a LightningModule"):
        cc.load_quantized(Classifier().net, trained[0], batch=trained[1])
