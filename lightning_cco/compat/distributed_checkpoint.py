"""Reading all of a distributed checkpoint without knowing what is in it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from lightning_cco.compat.resolve import find


def read_all(path: str) -> dict[str, Any]:
    """Everything in the directory of a distributed checkpoint, its parts put together, in one process.

    Private API: ``torch.distributed.checkpoint``'s ``default_planner._EmptyStateDictLoadPlanner`` and ``state_dict_loader._load_state_dict``. Without them: the
    same through a file that `dcp_to_torch_save` writes (slower, and as much room on disk once more).

    Raises:
        OSError: Some part of it can't be read.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        return _read(path)
    except CheckpointException as error:  # which is no Exception
        cause = next((found for found, _ in error.failures.values()), error)
        raise OSError(f"{type(cause).__name__}: {cause}") from error


def _read(path: str) -> dict[str, Any]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    try:
        planner = find("torch.distributed.checkpoint.default_planner._EmptyStateDictLoadPlanner")
        load = find("torch.distributed.checkpoint.state_dict_loader._load_state_dict")
    except AttributeError:
        return _through_a_file(path)
    found: dict[str, Any] = {}
    load(found, storage_reader=FileSystemReader(path), planner=planner(), no_dist=True)
    return found


def _through_a_file(path: str) -> dict[str, Any]:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "checkpoint.pt"
        dcp_to_torch_save(path, file)
        found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=False)
    return found
