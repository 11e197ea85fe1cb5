"""LiteRT (TensorFlow Lite), by way of litert-torch. Sources: its converter, and the operators of its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_cco.compat.decomposed import HOME
from lightning_cco.export.engines import program_process
from lightning_cco.export.engines.entry import Converted, Engine, Form, Want
from lightning_cco.export.engines.worker import Worker
from lightning_cco.export.provenance import LAYER


class LiteRT:
    """LiteRT's converter and its interpreter, in a process of their own.

    Raises:
        RuntimeError: They can't be loaded; the message is theirs.
    """

    def __init__(self) -> None:
        self._worker = Worker(program_process.__file__, str(Path(__file__).with_name("litert_process.py")), HOME)

    def convert(self, program: Path, target: Path) -> Converted:
        """Convert a program."""
        said = self._worker.ask(("convert", (str(program), str(target), LAYER)))
        formats = self._worker.ask(("formats", (str(target),)))
        notes = [f"'{name}' of the file is int8: value = {scale:.6g} · (integer − {zero})" for name, (scale, zero) in formats.items()]
        return Converted(said["integer"], said["floats"], tuple(said["products"]), said["conversions"], tuple(notes))

    def run(self, path: Path, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """The outputs of a file."""
        return self._worker.ask(("run", (str(path), list(arrays))))  # type: ignore[no-any-return]

    def time(self, path: Path, arrays: Sequence[np.ndarray[Any, Any]], count: int) -> list[float]:
        """Seconds of single runs."""
        return self._worker.ask(("time", (str(path), list(arrays), count)))  # type: ignore[no-any-return]


LITERT = Engine(
    "litert",
    "LiteRT",
    (Want(Form.SIGNED, "2.3", "its kernels in INT8 take int8 alone", ""),),
    package="litert_torch",
    ending=".tflite",
    extra="litert",
    start=LiteRT,
    # 0.10 of its converter rounds what is concatenated as the result is, in the place of as it is by itself: a step off in a fifth of the values.
    mean_steps=0.25,
    fixed_sizes="its files have fixed sizes",
    not_run="the file is for ONNX Runtime, planned as LiteRT computes; LiteRT reads .tflite files",
)
