"""ExecuTorch with XNNPACK. Sources: its partitioner's configurations, and what it makes of programs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from lightning_cco.export.engines.entry import Converted, Engine, FileFeature, Requirement
from lightning_cco.export.engines.program_reader import ProgramReader
from lightning_cco.export.provenance import LAYER


class ExecuTorch(ProgramReader):
    """ExecuTorch's lowering and its runtime, in a process of their own."""

    def __init__(self) -> None:
        super().__init__("executorch_process")

    def convert(self, program: Path, target: Path) -> Converted:
        """Lower a program to XNNPACK, and what it has no operator for to ExecuTorch's own."""
        said = self.call("convert", str(program), str(target), LAYER)
        integer = Counter(operator for operator, _, on_integers, _ in said["nodes"] if on_integers)
        floats = Counter(operator for operator, _, on_integers, _ in said["nodes"] if not on_integers)
        alone = Counter(operator for operator, delegated, *_ in said["nodes"] if not delegated)
        layers = tuple((operator, layer, on_integers) for operator, _, on_integers, layer in said["nodes"])
        notes = [f"XNNPACK computes {said['parts']} part{'s' if said['parts'] != 1 else ''} of it"]
        if alone:
            notes[0] += (
                f"; ExecuTorch's own kernels compute {', '.join(f'{count} {operator}' for operator, count in sorted(alone.items()))}"
            )
        return Converted(integer, floats, layers, said["conversions"], tuple(notes))


EXECUTORCH = Engine(
    "executorch",
    "ExecuTorch",
    (
        Requirement(FileFeature.SIGNED, "1.5", "XNNPACK has no kernels for uint8: its partitioner leaves such operators to float", ""),
        Requirement(
            FileFeature.JOINED, "1.5", "XNNPACK joins integers of one scale alone; with others a file is written that does not load", ""
        ),
    ),
    package="executorch",
    ending=".pte",
    extra="executorch",
    start=ExecuTorch,
    plans=("litert",),
    fixed_sizes="its memory is planned for sizes that are known",
    not_run="the file is for ONNX Runtime, planned as ExecuTorch computes; ExecuTorch reads .pte files",
)
