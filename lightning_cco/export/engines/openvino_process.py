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
        precision = "i8" if _multiplies_integers(node, names) else str(said["runtimePrecision"])
        found.append((str(said["layerType"]), precision, names))
    return found


def _multiplies_integers(node: Any, names: tuple[str, ...]) -> bool:
    """Whether a node that several operators were put into (a ``Subgraph``: small linear layers in a row, with AVX-512) has a product of integers.

    Such a node's precision is that of what it reads first. The product reads integers, and what makes floats of its result is called after it, in the node too.
    """
    reads_integers = any(read.get_element_type().get_type_name() in ("i8", "u8") for read in node.inputs())
    return reads_integers and any(f"{name}/DequantizationMultiply" in names for name in names)
