"""OpenVINO in a separate process: where it is loaded, later forks of a training (workers of a loader) and then a further process end in a crash.

`engine_process` loads it; it imports nothing of lightning_cco.
"""

from __future__ import annotations

from typing import Any

_loaded: dict[str, Any] = {}


def load(path: str) -> None:
    """Compile a file for the CPU; what is asked later is about it."""
    import openvino

    # On processors with VNNI it rounds what it multiplies integer weights with, in groups of 32 values of a row, unless it is told not to.
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    _loaded["model"] = openvino.Core().compile_model(path, "CPU", exact)


def run(feeds: dict[str, Any]) -> list[Any]:
    """The outputs, in the file's order, of arrays by the names of inputs."""
    results = _loaded["model"](feeds)
    return [results[output] for output in _loaded["model"].outputs]


def executed() -> list[tuple[str, str, tuple[str, ...]]]:
    """Operator, precision and names of each node."""
    found = []
    for node in _loaded["model"].get_runtime_model().get_ordered_ops():
        said = {name: node.get_rt_info()[name].astype(str) for name in ("layerType", "runtimePrecision", "originalLayersNames")}
        names = (node.get_friendly_name(), *said["originalLayersNames"].split(","))
        found.append((str(said["layerType"]), str(said["runtimePrecision"]), names))
    return found
