"""LiteRT (TensorFlow Lite), by way of litert-torch. Sources: its converter, and the operators of its files."""

from __future__ import annotations

from pathlib import Path

from lightning_cco.export.check_limits import Limits
from lightning_cco.export.engines.entry import Engine, FileFeature, Requirement
from lightning_cco.export.engines.program_reader import ProgramReader


class LiteRT(ProgramReader):
    """LiteRT's converter and its interpreter, in a process of their own."""

    def __init__(self) -> None:
        super().__init__("litert_process")

    def notes(self, target: Path) -> list[str]:
        """How the integers of inputs and outputs are to be read."""
        formats = self.call("formats", str(target))
        return [f"'{name}' of the file is int8: value = {scale:.6g} · (integer − {zero})" for name, (scale, zero) in formats.items()]


LITERT = Engine(
    "litert",
    "LiteRT",
    (
        Requirement(FileFeature.SIGNED, "2.3", "its kernels in INT8 take int8 alone", ""),
        Requirement(
            FileFeature.POOLS_AS_CONVOLUTIONS,
            "2.3",
            "its converter computes an average pooling between roundings in INT8, on the scale of what it reads: 9 steps off on average after a ReLU",
            "",
        ),
    ),
    package="litert_torch",
    ending=".tflite",
    extra="litert",
    start=LiteRT,
    # 0.10 of its converter rounds what is concatenated as the result is, in the place of as it is by itself: a step off in a fifth of the values.
    limits=Limits(mean_steps=0.25),
    fixed_sizes="its files have fixed sizes",
    not_run="the file is for ONNX Runtime, planned as LiteRT computes; LiteRT reads .tflite files",
)
