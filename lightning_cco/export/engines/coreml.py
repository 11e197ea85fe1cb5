"""Core ML, by way of coremltools. Sources: its converter, and the programs (MIL) that it makes; it runs on Apple's systems alone, and was not run."""

from __future__ import annotations

from lightning_cco.export.engines.entry import Engine, FileFeature, Requirement
from lightning_cco.export.engines.program_reader import ProgramReader


class CoreML(ProgramReader):
    """Core ML's converter, in a separate process."""

    def __init__(self) -> None:
        super().__init__("coreml_process")


COREML = Engine(
    "coreml",
    "Core ML",
    (Requirement(FileFeature.SIGNED, "9.0", "not known; its own tools quantize to int8", ""),),
    package="coremltools",
    ending=".mlpackage",
    extra="coreml",
    start=CoreML,
    plans=("executorch", "litert"),
    fixed_sizes="its files have fixed sizes",
    not_run="the file is for ONNX Runtime, planned as Core ML is thought to compute; Core ML reads .mlpackage files",
    reads_alone="the file was converted and read, not run: Core ML runs on Apple's systems alone. The program that it was made of was run in PyTorch",
)
