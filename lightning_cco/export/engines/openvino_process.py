"""OpenVINO in a process of its own: where it is loaded, later forks of a training (workers of a loader) and then a further process end in a crash.

Run as a script, with the path of a file; it imports nothing of lightning_cco. Messages are pickles of `None` (what is executed) or of arrays by the names of
inputs (outputs), each answered by ``(result, error)``.
"""

from __future__ import annotations

import pickle
import sys
from typing import Any


def serve(path: str) -> None:
    """Compile a file, and answer until standard input ends."""
    import openvino

    answers = sys.stdout.buffer
    try:
        # On processors with VNNI it rounds what it multiplies integer weights with, in groups of 32 values of a row, unless it is told not to.
        exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
        model = openvino.Core().compile_model(path, "CPU", exact)
        _answer(answers, None, "")
    except Exception as error:
        _answer(answers, None, f"{type(error).__name__}: {error}")
        return
    while True:
        try:
            asked = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            _answer(answers, _executed(model) if asked is None else _outputs(model, asked), "")
        except Exception as error:
            _answer(answers, None, f"{type(error).__name__}: {error}")


def _outputs(model: Any, feeds: dict[str, Any]) -> list[Any]:
    results = model(feeds)
    return [results[output] for output in model.outputs]


def _executed(model: Any) -> list[tuple[str, str, tuple[str, ...]]]:
    """Operator, precision and names of each node."""
    found = []
    for node in model.get_runtime_model().get_ordered_ops():
        said = {name: node.get_rt_info()[name].astype(str) for name in ("layerType", "runtimePrecision", "originalLayersNames")}
        names = (node.get_friendly_name(), *said["originalLayersNames"].split(","))
        found.append((str(said["layerType"]), str(said["runtimePrecision"]), names))
    return found


def _answer(stream: Any, result: Any, error: str) -> None:
    pickle.dump((result, error), stream)
    stream.flush()


if __name__ == "__main__":
    del sys.path[0]  # this folder, in which a module is called openvino, too
    serve(sys.argv[1])
