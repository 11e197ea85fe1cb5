"""An engine whose files are made of programs (PT2E), in a separate process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_cco.compat.decomposed import HOME
from lightning_cco.export.engines.entry import Converted
from lightning_cco.export.engines.worker import EngineWorker
from lightning_cco.export.provenance import LAYER


class ProgramReader(EngineWorker):
    """Converts programs into the engine's own files, and runs them where it can.

    Args:
        name: Name of the module in this package that has ``convert`` and, where the engine can be run, ``run``.

    Raises:
        RuntimeError: The engine can't be loaded; the message is its own.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, HOME)

    def convert(self, program: Path, target: Path) -> Converted:
        """Convert a program, and write the engine's file."""
        said = self.call("convert", str(program), str(target), LAYER)
        return Converted(
            said["integer"], said["floats"], tuple(said["layers"]), said["conversions"], tuple(self.notes(target)), said.get("faults", {})
        )

    def notes(self, target: Path) -> list[str]:
        """What else is to be said of a file."""
        return []

    def run(self, path: Path, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """The outputs of a file."""
        return self.call("run", str(path), list(arrays))  # type: ignore[no-any-return]
