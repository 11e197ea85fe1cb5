"""OpenVINO. Sources: its guide to low-precision transformations, and the graphs that it executes."""

from __future__ import annotations

from pathlib import Path

from lightning_cco.export.engines.entry import Computed, Engine, FileFeature, Requirement
from lightning_cco.export.engines.worker import FileWorker

_PRODUCTS = ("Convolution", "FullyConnected", "MatMul")
_MOVES = frozenset({
    "Input", "Output", "Const", "Parameter", "Result", "Reorder", "Reshape", "Transpose", "Convert", "FakeQuantize", "Gather", "Split", "StridedSlice",
    "Broadcast", "Tile", "Pad", "ShapeOf", "SpaceToDepth", "DepthToSpace", "MemoryInput", "MemoryOutput", "NonZero", "Range", "OneHot", "Unique",
})  # fmt: skip
_CANARIES = "tests/export/test_engine_canaries.py"


class Compiled(FileWorker):
    """A file compiled for the CPU, in a separate process (`openvino_process`): floats are of 32 bits, and rounded where the file rounds them.

    Args:
        path: The file.

    Raises:
        RuntimeError: OpenVINO can't load it, or its process has ended; the message is its own.
    """

    def __init__(self, path: Path) -> None:
        super().__init__("openvino_process", path)

    def computed(self) -> list[Computed]:
        """What is executed, in order."""
        return [Computed(kind, precision, kind in _PRODUCTS, names, kind not in _MOVES) for kind, precision, names in self.call("executed")]


OPENVINO = Engine(
    "openvino",
    "OpenVINO",
    (
        Requirement(
            FileFeature.INTEGER_CLIPS,
            "2026.4",
            "it takes a clamp of floats to the wrong bounds where the tensors of a concat before it have scales of their own: a U-Net of 4 bits agreed "
            "at 16 dB instead of 30",
            f"{_CANARIES}::test_openvino_integer_clips",
        ),
        Requirement(
            FileFeature.SORTED_MAXIMA,
            "2026.4",
            "it rounds the result of a ReduceMax of values below 0 wrongly: by 21 steps on average between a convolution and a linear layer",
            f"{_CANARIES}::test_openvino_sorted_maxima",
        ),
        Requirement(
            FileFeature.COUNTED_SIZES,
            "2026.4",
            "it leaves out a convolution's bias where a tensor is expanded to a size that a Shape operator reads: a vision transformer, whose class token is "
            "expanded to the size of the batch, agreed at 21 dB instead of 50",
            f"{_CANARIES}::test_openvino_counted_sizes",
        ),
    ),
    load=Compiled,
    package="openvino",
    rounds_as_it_runs="on processors with VNNI OpenVINO 2026.4 rounds to 8 bits what it multiplies integer weights with, in groups of 32 values of a row; it "
    'was compared without that. To compute it in float: compile_model(model, "CPU", {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"})',
)
