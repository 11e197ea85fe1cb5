"""ExecuTorch with XNNPACK. Sources: its partitioner's configurations, and what it makes of programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_cco.compat.decomposed import HOME
from lightning_cco.export.engines import program_process
from lightning_cco.export.engines.entry import Converted, Engine, Form, Want
from lightning_cco.export.engines.worker import Worker
from lightning_cco.export.provenance import LAYER


class ExecuTorch:
    """ExecuTorch's lowering and its runtime, in a process of their own.

    Raises:
        RuntimeError: They can't be loaded; the message is theirs.
    """

    def __init__(self) -> None:
        self._worker = Worker(program_process.__file__, str(Path(__file__).with_name("executorch_process.py")), HOME)

    def convert(self, program: Path, target: Path) -> Converted:
        """Lower a program to XNNPACK, and what it has no operator for to ExecuTorch's own."""
        said = self._worker.ask(("convert", (str(program), str(target), LAYER)))
        integer = Counter(operator for operator, _, on_integers, _, _ in said["nodes"] if on_integers)
        floats = Counter(operator for operator, _, on_integers, _, _ in said["nodes"] if not on_integers)
        alone = Counter(operator for operator, delegated, *_ in said["nodes"] if not delegated)
        products = tuple((operator, layer, on_integers) for operator, _, on_integers, product, layer in said["nodes"] if product)
        notes = [f"XNNPACK computes {said['parts']} part{'s' if said['parts'] != 1 else ''} of it"]
        if alone:
            notes[0] += (
                f"; ExecuTorch's own kernels compute {', '.join(f'{count} {operator}' for operator, count in sorted(alone.items()))}"
            )
        return Converted(integer, floats, products, said["conversions"], tuple(notes))

    def run(self, path: Path, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """The outputs of a file."""
        return self._worker.ask(("run", (str(path), list(arrays))))  # type: ignore[no-any-return]

    def time(self, path: Path, arrays: Sequence[np.ndarray[Any, Any]], count: int) -> list[float]:
        """Seconds of single runs."""
        return self._worker.ask(("time", (str(path), list(arrays), count)))  # type: ignore[no-any-return]


EXECUTORCH = Engine(
    "executorch",
    "ExecuTorch",
    (
        Want(Form.SIGNED, "1.5", "XNNPACK has no kernels for uint8: its partitioner leaves such operators to float", ""),
        Want(Form.JOINED, "1.5", "XNNPACK joins integers of one scale alone; with others a file is written that does not load", ""),
    ),
    package="executorch",
    ending=".pte",
    extra="executorch",
    start=ExecuTorch,
    plans=("litert",),
    fixed_sizes="its memory is planned for sizes that are known",
    not_run="the file is for ONNX Runtime, planned as ExecuTorch computes; ExecuTorch reads .pte files",
)
