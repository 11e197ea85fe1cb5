"""What the callback reads from checkpoints: its own state, checked, and the weights of a file of this run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from torch import Tensor

from lightning_cco.errors import CCOError
from lightning_cco.quantization.state import check_state, entry, names, refuse


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
    known = state["quantized"]["kinds"]
    for key in ("skips", "pending_skips"):
        for name in names(state, key):
            if name not in known:
                refuse(key, "names of layers of the checkpoint's model", name)


def read_checkpoint(path: str) -> dict[str, Any]:
    """Weights and callbacks' states of a checkpoint that this run has written.

    Args:
        path: A file, local or remote, or the directory of a distributed checkpoint.

    Raises:
        CCOError: It is gone, or holds no weights.
    """
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
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    weights: dict[str, Any] = {}
    _load_state_dict(weights, storage_reader=FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True)  # type: ignore[no-untyped-call]
    found = weights.get("state_dict", weights)
    prefix = "state_dict."
    flat = {key.removeprefix(prefix): value for key, value in found.items() if isinstance(value, Tensor)}
    if not flat:
        raise CCOError(f"the best checkpoint, {path}, holds no weights.")
    rest = Path(path) / "meta.pt"
    meta = torch.load(rest, map_location="cpu", weights_only=False) if rest.is_file() else {}
    return {**meta, "state_dict": flat}
