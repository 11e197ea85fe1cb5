"""An engine in a separate process: what it loads there disturbs nobody, and where it crashes, the training does not."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightning_cco.export.engines import engine_process


class Worker:
    """A script that answers questions until it is dropped.

    Messages are pickles, each answered by ``(result, error)``; the first answer comes unasked.

    Args:
        script: Path of the script.
        *arguments: Of its command line.

    Raises:
        RuntimeError: It can't start; the message is its own.
    """

    def __init__(self, script: str, *arguments: str) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
        )
        weakref.finalize(self, _end, self._process, self._said)
        self._answer()

    def ask(self, what: Any) -> Any:
        """The answer to a question.

        Raises:
            RuntimeError: It failed, or the process has ended.
        """
        assert self._process.stdin is not None
        try:
            pickle.dump(what, self._process.stdin)
            self._process.stdin.flush()
        except OSError as error:
            raise RuntimeError(self._ended()) from error
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        try:
            result, error = pickle.load(self._process.stdout)
        except EOFError:
            raise RuntimeError(self._ended()) from None
        if error:
            said = self._last_line()
            raise RuntimeError(f"{error} ({said})" if said.startswith("[") and said not in error else error)
        return result

    def _ended(self) -> str:
        status, said = self._process.wait(), self._last_line()
        return f"its process has ended with status {status}{f': {said}' if said else ''}"

    def _last_line(self) -> str:
        """The end of what an engine has printed: ``[file:line] message``; of other lines the last one, where there is none."""
        self._said.seek(0)
        said = [line for line in self._said.read().decode(errors="replace").splitlines() if line.strip()]
        own = [line for line in said if line.startswith("[") and "]" in line]
        return (own or said or [""])[-1].strip()[:300]


class EngineWorker(Worker):
    """An engine in a separate process: the functions of a module there, which imports nothing of lightning_cco.

    Args:
        name: Name of the module in this package, such as ``openvino_process``.
        *imported: Modules that are imported there first.

    Raises:
        RuntimeError: The engine can't be loaded; the message is its own.
    """

    def __init__(self, name: str, *imported: str) -> None:
        super().__init__(engine_process.__file__, str(Path(__file__).with_name(f"{name}.py")), *imported)

    def call(self, function: str, *arguments: Any) -> Any:
        """What a function of the module gives.

        Raises:
            RuntimeError: It failed, or the process has ended.
        """
        return self.ask((function, arguments))


class FileWorker(EngineWorker):
    """A file, loaded by an engine in a separate process.

    Args:
        name: Name of the module in this package that has ``load``, ``run`` and ``executed``.
        path: The file.

    Raises:
        RuntimeError: The engine can't load it; the message is its own.
    """

    def __init__(self, name: str, path: Path) -> None:
        super().__init__(name)
        self.call("load", str(path))

    def run(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """The outputs, in the file's order.

        Raises:
            RuntimeError: It failed, or the process has ended.
        """
        return self.call("run", dict(feeds))  # type: ignore[no-any-return]


def _end(process: subprocess.Popen[bytes], said: Any) -> None:
    for stream in (process.stdin, process.stdout, said):
        if stream is not None:
            stream.close()
    process.kill()
    process.wait()
