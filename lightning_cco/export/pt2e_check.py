"""Checks a program with quantized operators: what each layer computes in PyTorch, and in the engine that it is for, against fake-quantization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_cco.export.dialects.pt2e_operators import SHIFT
from lightning_cco.export.local_check import LocalRun
from lightning_cco.export.ort_session import QuantizeNode
from lightning_cco.export.outputs import Arrays, Outputs, arrays_of, class_axes, tell
from lightning_cco.export.provenance import PAIR, noted
from lightning_cco.export.qdq_emitter import Emitter
from lightning_cco.export.report import ExportReport
from lightning_cco.quantization.model import HookedModel

Array = np.ndarray[Any, Any]
_TOLERANCE = 1e-5
"""Of a scale."""


class Comparison:
    """Outputs and quantized tensors of a program, wherever it runs, compared with those of the fake-quantized model.

    Args:
        quantized: The model.
        emitter: What wrote the program.
        rounded: Its rounded tensors by quantizer.
        names: Names of the outputs.
    """

    def __init__(self, quantized: HookedModel, emitter: Emitter, rounded: Mapping[str, list[QuantizeNode]], names: Sequence[str]) -> None:
        self.quantized, self.emitter, self._names = quantized, emitter, list(names)
        self.local = LocalRun(quantized, rounded)
        self.outputs: Outputs | None = None

    def add(self, tensors: tuple[Tensor, ...], results: Arrays, inspected: Arrays, levels: Mapping[str, Array]) -> None:
        """Take one batch in.

        Args:
            tensors: Its inputs.
            results: What the program gives.
            inspected: What it gives where its rounded tensors are outputs, too.
            levels: These, as integers, by the names of ``rounded``.

        Raises:
            CCOError: The outputs are others, or of other shapes.
        """
        expected = arrays_of(self.emitter.model(*tensors))
        with self.local.going_on_from(levels):
            going_on = arrays_of(self.emitter.model(*tensors))
        if self.outputs is None:
            self.outputs = Outputs(self._names, class_axes(self.quantized.graph, [array.shape for array in expected]))
        self.outputs.add(expected, results, going_on, inspected)

    def tell(self, report: ExportReport) -> None:
        """Fill the comparison into a report."""
        tell(report, self.local, self.outputs)


class RecordedProgram:
    """A program that runs in PyTorch and keeps the integers that it rounds to.

    Attributes:
        rounded: Its quantize operators by quantizer.
        levels: The integers of the last run, by the names in ``rounded``.
    """

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self._module: Any = program.module()
        self.rounded: dict[str, list[QuantizeNode]] = {}
        self.levels: dict[str, Array] = {}
        levels = self.levels

        def keep(name: str, value: Tensor) -> None:
            levels[name] = value.numpy()

        graph = self._module.graph
        for node in list(graph.nodes):
            quantizer = noted(node, PAIR)
            if quantizer:
                self.rounded.setdefault(quantizer, []).append(QuantizeNode(node.name, node.args[1], node.args[2]))
                with graph.inserting_after(node):
                    graph.call_function(keep, (node.name, node))
        self._module.recompile()

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the program gives."""
        with torch.no_grad():
            return self._module(*args, **kwargs)


def levels_of(values: Arrays, scales: Mapping[str, float]) -> dict[str, Array]:
    """QuantizeNode tensors as multiples of their scales, by their numbers.

    Args:
        values: The tensors.
        scales: Their scales by number.
    """
    return {str(number): np.rint(array / np.float32(scales[str(number)])) for number, array in enumerate(values)}


def format_faults(quantized: HookedModel, rounded: Mapping[str, list[QuantizeNode]], signed: bool) -> dict[str, str]:
    """Layers whose tensors are rounded to another scale or zero point than the model's, in words; ``signed``: with zero points that are less by 128."""
    faults: dict[str, str] = {}
    for key, quantizer in quantized.activations.items():
        scale = float(quantizer.scale)
        zero = int(quantizer.zero_point) - (SHIFT if signed and not quantizer.symmetric else 0)
        for entry in rounded.get(key, []):
            if abs(entry.scale - scale) > _TOLERANCE * scale:
                faults.setdefault(key.layer, f"its scale is {entry.scale:.6g} instead of {scale:.6g}")
            if entry.zero_point != zero:
                faults.setdefault(key.layer, f"its zero point is {entry.zero_point} instead of {zero}")
    return faults
