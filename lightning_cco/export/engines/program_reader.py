"""An engine whose files are made of programs (PT2E), in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_cco.compat.decomposed import HOME
from lightning_cco.export.engines import program_process
from lightning_cco.export.engines.worker import Worker


class ProgramReader:
    """What such engines have in common: their files are run by the same request.

    Args:
        process: Name of the module beside this one that answers them.

    Raises:
        RuntimeError: The engine can't be loaded; the message is its own.
    """

    def __init__(self, process: str) -> None:
        self.worker = Worker(program_process.__file__, str(Path(__file__).with_name(f"{process}.py")), HOME)

    def run(self, path: Path, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """The outputs of a file."""
        return self.worker.ask(("run", (str(path), list(arrays))))  # type: ignore[no-any-return]
