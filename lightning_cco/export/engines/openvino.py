"""OpenVINO. Sources: its guide to low-precision transformations, and the graphs that it executes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightning_cco.export.engines.entry import Computed, Engine, Form, Want

_PRODUCTS = ("Convolution", "FullyConnected", "MatMul")
_CANARIES = "tests/export/test_engine_canaries.py"


class Compiled:
    """A file compiled for the CPU, with floats of 32 bits where it computes in float.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        import openvino

        self._model = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """The outputs, in the file's order."""
        results = self._model(dict(feeds))
        return [results[output] for output in self._model.outputs]

    def computed(self) -> list[Computed]:
        """What is executed, in order."""
        found = []
        for node in self._model.get_runtime_model().get_ordered_ops():
            said = {name: node.get_rt_info()[name].astype(str) for name in ("layerType", "runtimePrecision", "originalLayersNames")}
            names = (node.get_friendly_name(), *said["originalLayersNames"].split(","))
            found.append(Computed(said["layerType"], said["runtimePrecision"], said["layerType"] in _PRODUCTS, names))
        return found


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
)
