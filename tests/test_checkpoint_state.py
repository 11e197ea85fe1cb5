"""Checkpoints with a damaged state, with none, and those that are exported when fit ends."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import Classifier, batches, make_trainer, quick
from torch import nn

from lightning_cco import CCOCallback, CCOError, CCOWarning
from lightning_cco.checkpoints import read_checkpoint
from lightning_cco.run_export import RunExport


def ranges(key: str, value: Any) -> Callable[[Any], None]:
    def damage(state: Any) -> None:
        next(iter(state["quantized"]["ranges"].values()))[key] = value

    return damage


def put(value: Any, *path: str) -> Callable[[Any], None]:
    def damage(state: Any) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return damage


DAMAGES = {
    "quantized.version": put(99, "quantized", "version"),
    "quantized.frozen": put("False", "quantized", "frozen"),
    "quantized.kinds": put(None, "quantized", "kinds"),
    "skips": put(["no such layer"], "skips"),
    "pending_skips": put("conv", "pending_skips"),
    "original_metrics": put([], "original_metrics"),
    "scale": ranges("scale", torch.tensor(-1.0)),
    "scale, not the range's": ranges("scale", torch.tensor(77.0)),
    "min_val": ranges("min_val", torch.tensor(float("nan"))),
    "max_val": ranges("max_val", torch.tensor(-100.0)),
    "zero_point": ranges("zero_point", torch.tensor(0.5)),
    "clip_ratio": ranges("clip_ratio", torch.ones(3)),
    "num_bits": ranges("num_bits", "8"),
    "zero_point, not the range's": ranges("zero_point", torch.tensor(250.0)),
    "scale, without values": ranges("scale", torch.ones((), device="meta")),
}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> CCOCallback:
    cco = quick()
    make_trainer(tmp_path_factory.mktemp("fit"), cco).fit(Classifier(), batches())
    return cco


@pytest.mark.parametrize("name", list(DAMAGES))
def test_a_damaged_state_is_refused_by_name_and_nothing_is_applied(name: str, fitted: CCOCallback) -> None:
    good = copy.deepcopy(fitted.state_dict())
    fitted.load_state_dict(copy.deepcopy(good))
    bad = copy.deepcopy(good)
    DAMAGES[name](bad)
    key = {"quantized.version": "version 99", "max_val": "max_val"}.get(name, name.partition(",")[0])
    with pytest.raises(CCOError, match=key):
        fitted.load_state_dict(bad)
    after = fitted.state_dict()
    for quantizer, values in good["quantized"]["ranges"].items():
        for what, value in values.items():
            assert torch.equal(torch.as_tensor(after["quantized"]["ranges"][quantizer][what]), torch.as_tensor(value))


def test_missing_keys_are_named(fitted: CCOCallback) -> None:
    whole = copy.deepcopy(fitted.state_dict())
    for key in whole:
        state = copy.deepcopy(whole)
        del state[key]
        with pytest.raises(CCOError, match=f"lacks '{key}'"):
            fitted.load_state_dict(state)
    for key in whole["quantized"]:
        state = copy.deepcopy(whole)
        del state["quantized"][key]
        with pytest.raises(CCOError, match=rf"lacks 'quantized\.{key}'"):
            fitted.load_state_dict(state)
    for key in (ranges := whole["quantized"]["ranges"])[name := next(iter(ranges))]:
        state = copy.deepcopy(whole)
        del state["quantized"]["ranges"][name][key]
        with pytest.raises(CCOError, match=rf"lacks 'quantized\.ranges\.{name}\.{key}'"):
            fitted.load_state_dict(state)


def test_states_of_version_1_may_lack_what_came_later(fitted: CCOCallback) -> None:
    state = copy.deepcopy(fitted.state_dict())
    for key in ("calibrated_metrics", "distillation", "stages", "monitor", "layer_times"):
        del state[key]
    for key in ("layers", "inputs", "suggestions", "weight_scales", "bias_corrections"):
        del state["quantized"][key]
    for ranges in state["quantized"]["ranges"].values():
        del ranges["settled"]
    state["quantized"]["version"] = 1
    fitted.load_state_dict(state)


def test_weights_alone_are_not_tested_in_float_without_a_word(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss", save_weights_only=True)
    make_trainer(tmp_path, quick(), checkpoint).fit(Classifier(), batches(), batches(seed=5))
    with pytest.warns(CCOWarning, match="runs in float.*save_weights_only"):
        make_trainer(tmp_path, quick()).test(Classifier(), batches(), ckpt_path=checkpoint.best_model_path, verbose=False)


class WithObjects(Classifier):
    def __init__(self, options: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("weights_only", [True, False])
def test_the_best_weights_are_exported(weights_only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From weights alone, and with hyperparameters of one's own classes."""
    cco = quick(deployment_settings={"export_dir": str(tmp_path / "int8")})
    exported: list[Any] = []

    def export(path: Path) -> None:
        model = cco.quantized.model
        exported.append(({name: value.clone() for name, value in model.state_dict().items()}, cco.quantized.state_dict()["ranges"]))

    monkeypatch.setattr(cco, "export", export)
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max", save_weights_only=weights_only)  # the best is not the last
    model = WithObjects(argparse.Namespace(lr=0.1))
    make_trainer(tmp_path, cco, checkpoint, max_epochs=2).fit(model, batches(), batches(seed=5))
    saved = torch.load(checkpoint.best_model_path, weights_only=False)
    assert all(torch.equal(value, saved["state_dict"][name]) for name, value in exported[0][0].items())
    if not weights_only:
        kept = saved["callbacks"][cco.state_key]["quantized"]["ranges"]
        assert all(torch.equal(value["scale"], kept[key]["scale"]) for key, value in exported[0][1].items())


class Changes(nn.Module):
    """Its extra state is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = {"epochs": 0}

    def get_extra_state(self) -> dict[str, int]:
        return dict(self.seen)

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seen = dict(state)


class Particular(Classifier):
    """Saves its weights under other names and leaves some out; reads them back, and notes that it did."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading, self.loaded, self.changes = False, 0, Changes()
        self.kept = next(name for name, _ in self.named_parameters())

    def on_train_epoch_end(self) -> None:
        self.changes.seen["epochs"] += 1

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {f"old.{name}": value for name, value in checkpoint["state_dict"].items() if name != self.kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {name.removeprefix("old."): value for name, value in checkpoint["state_dict"].items()}
        self.loaded += 1


@pytest.mark.filterwarnings("ignore")
def test_a_module_that_reads_its_checkpoints_in_its_own_way_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cco = quick(deployment_settings={"export_dir": str(tmp_path / "int8")})
    model, exported = Particular(), []
    monkeypatch.setattr(cco, "export", lambda path: exported.append((copy.deepcopy(dict(model.state_dict())), model.loaded)))
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss", mode="min")  # the best is not the last
    make_trainer(tmp_path, cco, checkpoint, max_epochs=2).fit(model, batches(), batches(seed=5))
    saved = torch.load(checkpoint.best_model_path, weights_only=False)["state_dict"]
    [(weights, loaded)] = exported
    assert loaded == 1
    names = {name for name, _ in model.named_parameters()} - {model.kept}
    assert names
    assert all(torch.equal(weights[name], saved[f"old.{name}"]) for name in names)
    # The model is as the training left it.
    assert model.loaded == 0
    assert model.changes.seen == {"epochs": 2}
    assert not all(torch.equal(value, saved[f"old.{name}"]) for name, value in model.named_parameters() if name in names)


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "folder.ckpt").mkdir()
    (tmp_path / "broken.ckpt").mkdir()
    (tmp_path / "broken.ckpt" / ".metadata").write_bytes(b"half")
    for name, said in (("empty.ckpt", "can't be read"), ("folder.ckpt", "holds no .metadata"), ("broken.ckpt", "can't be read")):
        with pytest.raises(CCOError, match=f"{name}.*{said}"):
            read_checkpoint(str(tmp_path / name))


def test_a_failed_export_puts_everything_back_and_says_what_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cco = quick(deployment_settings={"export_dir": str(tmp_path / "int8")})
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max")
    model = Classifier()
    before: list[Any] = []

    def load(export: RunExport, path: str) -> None:
        before.append({name: value.clone() for name, value in model.state_dict().items()})
        with torch.no_grad():
            next(model.parameters()).zero_()
        raise KeyError("callbacks")

    monkeypatch.setattr(RunExport, "_load", load)
    with pytest.raises(CCOError, match="its checkpoints are saved"):
        make_trainer(tmp_path, cco, checkpoint).fit(model, batches(), batches(seed=5))
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
