"""What each engine requires of a file: one entry an engine, which `export` asks and in which nothing is decided about the plan."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_cco.export.engines.coreml import COREML
from lightning_cco.export.engines.entry import Computed, Converted, Engine, FileFeature, Loaded, Reader, Requirement
from lightning_cco.export.engines.executorch import EXECUTORCH
from lightning_cco.export.engines.litert import LITERT
from lightning_cco.export.engines.openvino import OPENVINO
from lightning_cco.export.engines.ort import ORT
from lightning_cco.export.engines.qnn import QNN
from lightning_cco.export.engines.tensorrt import TENSORRT

ENGINES: Mapping[str, Engine] = {engine.name: engine for engine in (ORT, OPENVINO, TENSORRT, EXECUTORCH, LITERT, COREML, QNN)}
"""The entries by the name of the engine's `Target`."""
PROGRAMS = tuple(name for name, engine in ENGINES.items() if engine.start is not None)
"""Those of engines that read programs with quantized operators (PT2E) instead of ONNX files."""
BY_ENDING: Mapping[str, Engine] = {ENGINES[name].ending: ENGINES[name] for name in PROGRAMS}
"""The engines that read programs, by the ending of their own files."""

__all__ = ["BY_ENDING", "ENGINES", "PROGRAMS", "Computed", "Converted", "Engine", "FileFeature", "Loaded", "Reader", "Requirement"]
