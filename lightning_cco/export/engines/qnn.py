"""QNN, the NPU of Qualcomm's chips, by ONNX Runtime. Sources: its execution provider's list of operators, and the graphs that it makes of files."""

from __future__ import annotations

import re
from pathlib import Path

from lightning_cco.export.check_limits import Limits
from lightning_cco.export.engines.entry import Computed, Engine, FileFeature, Requirement
from lightning_cco.export.engines.worker import FileWorker

_PRODUCTS = ("Conv2d", "Conv3d", "DepthWiseConv2d", "TransposeConv2d", "TransposeConv3d", "FullyConnected", "MatMul", "Lstm", "Gru")
_CANARIES = "tests/export/test_qnn_canaries.py"


class Compiled(FileWorker):
    """A file compiled for HTP alone: what that can't run is an error, not left to the CPU.

    Args:
        path: The file.

    Raises:
        RuntimeError: It can't be compiled, or its process has ended; the message is its own.
    """

    def __init__(self, path: Path) -> None:
        super().__init__("qnn_process", path)

    def computed(self) -> list[Computed]:
        """What is executed: a node that is laid out otherwise than in the file has a number after its name."""
        return [
            Computed(kind, precision, kind in _PRODUCTS, tuple(re.sub(r"_token_\d+$", "", name) for name in names), computes)
            for kind, precision, computes, names in self.call("executed")
        ]


QNN = Engine(
    "qnn",
    "QNN",
    (
        Requirement(
            FileFeature.INTEGER_BIAS,
            "2.7",
            "units have biases of 32-bit integers; ONNX Runtime 1.32 makes them of a bias in float by itself",
            f"{_CANARIES}::test_qnn_integer_bias",
        ),
        Requirement(
            FileFeature.INTEGER_CLIPS,
            "2.7",
            "a clamp of floats before a rounding keeps the layer before it in float",
            f"{_CANARIES}::test_qnn_integer_clips",
        ),
        Requirement(
            FileFeature.UNITS,
            "2.7",
            "it has no operators on integers alone, and computes in float what is read past a Gather, Split or Resize without a pair after it; of a table in "
            "float whose rows are rounded it cuts the levels off instead of rounding them: half a step off on average",
            f"{_CANARIES}::test_qnn_units",
        ),
    ),
    load=Compiled,
    package="onnxruntime_qnn",
    extra="qnn",
    fixed_batch="HTP compiles a graph for sizes that are known",
    # It multiplies by scales of few bits, looks smooth functions up, has floats of 16 bits, and rounds once where a convolution's result is concatenated: what
    # the convolution's own rounding would have clipped is not, then.
    limits=Limits(mean_steps=0.4, far_share=0.1, largest_steps=32.0, difference=0.01),
    strict=True,
    remark="QNN simulated HTP of a Snapdragon 8 Gen 2, with the CPU left out; what is in float there has 16 bits, which older chips have not",
)
