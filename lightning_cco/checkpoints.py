"""What the callback reads from checkpoints: its own state, checked, and the weights of a file of this run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from torch import Tensor

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
    """A folder of this machine; ``file://`` in front is taken off.

    Raises:
        CCOError: It is elsewhere.
    """
    path = folder.removeprefix("file://")
    if "://" in path:
        raise CCOError(
            f"{setting}: '{folder}' is not on a disk of this machine; a local folder was expected. Write one, and upload the file from there."
        )
    return path


def check_callback_state(state: Any) -> None:
    """Check a state of `CCOCallback` as a whole.

    Raises:
        CCOError: Some key is missing or can't be what it is; the message names it.
    """
    if not isinstance(state, Mapping):
        refuse("callbacks.CCOCallback", "a mapping", state)
    check_state(entry(state, "quantized", Mapping))
    entry(state, "settings", Mapping)
    for name, value in entry(state, "original_metrics", Mapping).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            refuse(f"original_metrics.{name}", "a number", value)
    for name, value in (entry(state, "distillation", Mapping) if "distillation" in state else {}).items():
        if not isinstance(value, str):
            refuse(f"distillation.{name}", "text", value)
    known = state["quantized"]["kinds"]
    for key in ("skips", "pending_skips"):
        for name in names(state, key):
            if name not in known:
                refuse(key, "names of layers of the checkpoint's model", name)


def read_checkpoint(path: str) -> dict[str, Any]:
    """Weights and callbacks' states of a checkpoint that this run has written.

    Args:
        path: A file, local or remote, or the directory of a distributed checkpoint. It is unpickled where its hyperparameters are of classes of
            one's own, which runs code of whoever wrote it: as ``trainer.test(ckpt_path=..., weights_only=False)`` does, give only files that you trust.

    Raises:
        CCOError: It is gone, or holds no weights.
    """
    if path.startswith("file:/") and not os.path.exists(path):
        path = "/" + path.removeprefix("file:").lstrip("/")
    if os.path.isdir(path):
        return _read_distributed(path)
    filesystem = get_filesystem(path)
    if not filesystem.exists(path):
        raise CCOError(f"the best checkpoint, {path}, is not there any more.")
    with filesystem.open(path, "rb") as file:
        try:
            saved: Any = torch.load(file, map_location="cpu", weights_only=True)
        except Exception:
            # Hyperparameters of the user's own classes. The file may be unpickled: it was written by this very run, on this machine.
            file.seek(0)
            saved = torch.load(file, map_location="cpu", weights_only=False)
    if not isinstance(saved, dict) or "state_dict" not in saved:
        raise CCOError(f"the best checkpoint, {path}, holds no 'state_dict'.")
    return saved


def _read_distributed(path: str) -> dict[str, Any]:
    """Gather a directory's parts, and the rest that Lightning saves beside them."""
    weights = read_all(path)
    found = weights.get("state_dict", weights)
    prefix = "state_dict."
    flat = {key.removeprefix(prefix): value for key, value in found.items() if isinstance(value, Tensor)}
    if not flat:
        raise CCOError(f"the best checkpoint, {path}, holds no weights.")
    rest = Path(path) / "meta.pt"
    meta = torch.load(rest, map_location="cpu", weights_only=False) if rest.is_file() else {}
    return {**meta, "state_dict": flat}
