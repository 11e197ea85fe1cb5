"""What the callback reads from checkpoints: its own state, checked, and the weights of a file of this run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from torch import Tensor, nn

from lightning_cco.compat.distributed_checkpoint import read_all
from lightning_cco.errors import CCOError
from lightning_cco.quantization.state_checks import check_state, entry, names, refuse


def best_checkpoint(trainer: pl.Trainer) -> tuple[str, str]:
    """The checkpoint of the best epoch: that of the first `ModelCheckpoint` that monitors a metric, else of the first that has saved anything.

    Returns:
        Its path, empty if there is none; and why it is this one, in words.
    """
    saved = [callback for callback in trainer.checkpoint_callbacks if getattr(callback, "best_model_path", "")]
    if not saved:
        return "", "no checkpoint was saved: the weights are those at the end of the training"
    chosen = next((callback for callback in saved if getattr(callback, "monitor", None)), saved[0])
    monitor = getattr(chosen, "monitor", None)
    by = (
        f"the {getattr(chosen, 'mode', '')} of {monitor}"
        if monitor
        else "the last that was saved, since no ModelCheckpoint monitors a metric"
    )
    others = f"; {len(saved) - 1} other checkpoint callbacks were not asked" if len(saved) > 1 else ""
    return str(getattr(chosen, "best_model_path", "")), f"{by}{others}"


def local_folder(folder: str, setting: str) -> str:
    """A folder of this machine; ``file://`` in front is taken off, ``~`` is the home directory.

    Raises:
        CCOError: It is elsewhere.
    """
    path = folder.removeprefix("file://")
    if "://" in path:
        raise CCOError(
            f"{setting}: '{folder}' is not on a disk of this machine: expected a local folder. Write one, and upload the file from there."
        )
    return os.path.expanduser(path)


def check_callback_state(state: Any) -> None:
    """Check a state of `CCOCallback` as a whole.

    Raises:
        CCOError: Some key is missing or can't be what it is; the message names it.
    """
    if not isinstance(state, Mapping):
        refuse("callbacks.CCOCallback", "a mapping", state)
    check_state(entry(state, "quantized", Mapping))
    entry(state, "settings", Mapping)
    later: dict[str, Any] = {"calibrated_metrics": {}, "distillation": {}, "stages": 0, "monitor": {}, "layer_times": None}
    whole = state if state["quantized"]["version"] >= 2 else {**later, **state}  # states of version 1 may lack what came later
    for key in ("original_metrics", "calibrated_metrics"):
        for name, value in entry(whole, key, Mapping).items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                refuse(f"{key}.{name}", "a number", value)
    for name, value in entry(whole, "distillation", Mapping).items():
        if not isinstance(value, str):
            refuse(f"distillation.{name}", "text", value)
    if entry(whole, "stages", int) < 0:
        refuse("stages", "a number of at least 0", state["stages"])
    entry(whole, "monitor", Mapping)
    entry(whole, "layer_times", (Mapping, type(None)))
    known = state["quantized"]["kinds"]
    for key in ("skips", "pending_skips"):
        for name in names(state, key):
            if name not in known:
                refuse(key, "names of layers of the checkpoint's model", name)


def read_checkpoint(path: str, weights_only: bool = False) -> dict[str, Any]:
    """Weights and callbacks' states of a checkpoint.

    Args:
        path: A file, local or remote, or the directory of a distributed checkpoint.
        weights_only: Refuse objects of classes of one's own, such as hyperparameters: reading them runs code of whoever wrote the file. Without it they are
            read, as ``trainer.test(ckpt_path=..., weights_only=False)`` does: for files that this very run has written, or that are trusted.

    Raises:
        CCOError: It is gone, can't be read, or holds no weights.
    """
    if path.startswith("file:/") and not os.path.exists(path):
        path = "/" + path.removeprefix("file:").lstrip("/")
    if os.path.isdir(path):
        return _read_distributed(path, weights_only)
    filesystem = get_filesystem(path)
    if not filesystem.exists(path):
        raise CCOError(f"the checkpoint {path} is not there any more.")
    with filesystem.open(path, "rb") as file:
        try:
            saved: Any = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            if weights_only:
                raise CCOError(
                    f"{_unreadable(path, error)} If it holds objects of classes of your own and you trust who wrote it, pass weights_only=False, "
                    "which lets it run code."
                ) from error
            file.seek(0)
            try:
                saved = torch.load(file, map_location="cpu", weights_only=False)
            except Exception as again:
                raise CCOError(f"{_unreadable(path, again)} The file is damaged, or is no checkpoint: choose another one.") from again
    if not isinstance(saved, dict) or "state_dict" not in saved:
        raise CCOError(f"the checkpoint {path} holds no 'state_dict'.")
    return saved


def _unreadable(path: str, error: BaseException) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"the checkpoint {path} can't be read: {type(error).__name__}: {first.rstrip('.')}."


def load_weights(model: nn.Module, saved: dict[str, Any]) -> None:
    """Load the weights of a checkpoint as Lightning does: a module may change what was saved first, and may say that some of it is left out.

    Args:
        model: The model.
        saved: The checkpoint; ``on_load_checkpoint`` may change it.

    Raises:
        RuntimeError: The weights are not those of the model.
    """
    strict = True
    if isinstance(model, pl.LightningModule):
        model.on_load_checkpoint(saved)
        strict = model.strict_loading
    model.load_state_dict(saved["state_dict"], strict=strict)


def _read_distributed(path: str, weights_only: bool) -> dict[str, Any]:
    """Gather a directory's parts, and the rest that Lightning saves beside them."""
    if not any(Path(path).glob("*.metadata")):
        raise CCOError(
            f"the checkpoint {path} is a folder, but not one of a distributed checkpoint: it holds no .metadata. Choose another one."
        )
    try:
        weights = read_all(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise CCOError(f"{_unreadable(path, error)} Some part of the folder is missing or damaged: choose another checkpoint.") from error
    found = weights.get("state_dict", weights)
    prefix = "state_dict."
    flat = {key.removeprefix(prefix): value for key, value in found.items() if isinstance(value, Tensor)}
    if not flat:
        raise CCOError(f"the checkpoint {path} holds no weights.")
    rest = Path(path) / "meta.pt"
    meta = torch.load(rest, map_location="cpu", weights_only=weights_only) if rest.is_file() else {}
    return {**meta, "state_dict": flat}
