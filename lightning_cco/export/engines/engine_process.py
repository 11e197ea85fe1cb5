"""The loop of an engine's process: it answers until standard input ends.

Run as a script; it imports nothing of lightning_cco. Messages are pickles of ``(function, arguments)``, each answered by ``(result, error)``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import sys
from typing import Any


def serve(module: str, *imported: str) -> None:
    """Answer until standard input ends.

    Args:
        module: Path of the module whose functions answer.
        *imported: Modules that are imported first, such as the one that registers the operators of programs.
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the engine prints is no answer
    try:
        for name in imported:
            importlib.import_module(name)
        spec = importlib.util.spec_from_file_location("engine", module)
        assert spec is not None
        assert spec.loader is not None
        engine: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(engine)
        _answer(answers, None, "")
    except Exception as error:
        _answer(answers, None, _named(error))
        return
    while True:
        try:
            function, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            _answer(answers, getattr(engine, function)(*arguments), "")
        except Exception as error:
            _answer(answers, None, _named(error))


def _answer(stream: Any, result: Any, error: str) -> None:
    pickle.dump((result, error), stream)
    stream.flush()


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    del sys.path[0]  # this folder, in which modules have the names of engines
    serve(*sys.argv[1:])
