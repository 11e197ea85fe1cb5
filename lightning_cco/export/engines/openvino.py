"""OpenVINO. Sources: its guide to low-precision transformations, and the graphs that it executes."""

from __future__ import annotations

import pickle
import subprocess
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightning_cco.export.engines import openvino_process
from lightning_cco.export.engines.entry import Computed, Engine, Form, Want

_PRODUCTS = ("Convolution", "FullyConnected", "MatMul")
_CANARIES = "tests/export/test_engine_canaries.py"


class Compiled:
    """A file compiled for the CPU, with floats of 32 bits where it computes in float, in a process of its own (`openvino_process`).

    Args:
        path: The file.

    Raises:
        RuntimeError: OpenVINO can't load it, or its process has ended; the message is its own.
    """

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", openvino_process.__file__, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        weakref.finalize(self, _end, self._process)
        self._answer()

    def run(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """The outputs, in the file's order."""
        return self._ask(dict(feeds))  # type: ignore[no-any-return]

    def computed(self) -> list[Computed]:
        """What is executed, in order."""
        return [Computed(kind, precision, kind in _PRODUCTS, names) for kind, precision, names in self._ask(None)]

    def _ask(self, what: Any) -> Any:
        assert self._process.stdin is not None
        try:
            pickle.dump(what, self._process.stdin)
            self._process.stdin.flush()
        except OSError as error:
            raise RuntimeError(f"its process has ended with status {self._process.wait()}") from error
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        try:
            result, error = pickle.load(self._process.stdout)
        except EOFError:
            raise RuntimeError(f"its process has ended with status {self._process.wait()}") from None
        if error:
            raise RuntimeError(error)
        return result


def _end(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    process.kill()
    process.wait()


OPENVINO = Engine(
    "openvino",
    "OpenVINO",
    (
        Want(
            Form.INTEGER_CLIPS,
            "2026.4",
            "it takes a clamp of floats to the wrong bounds where the tensors of a concat before it have scales of their own: a U-Net of 4 bits agreed "
            "at 16 dB instead of 30",
            f"{_CANARIES}::test_openvino_integer_clips",
        ),
    ),
    load=Compiled,
    package="openvino",
    dynamic_batch="OpenVINO 2026.4 can then leave out a convolution's bias",
    fixed_sizes="where they vary, OpenVINO 2026.4 can leave out a convolution's bias",
)
