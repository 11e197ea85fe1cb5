"""Comparison of a file with its model, batch by batch: each layer computed from the engine's own tensors, and the outputs from end to end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lightning_cco.export.feeds import ForwardArguments
from lightning_cco.export.local_check import LocalRun
from lightning_cco.export.ort_session import QuantizeNode
from lightning_cco.export.outputs import Outputs, arrays_of, class_axes, tell
from lightning_cco.export.report import ExportReport
from lightning_cco.quantization.model import HookedModel

Array = np.ndarray[Any, Any]


class Run(NamedTuple):
    """What the model and the file made of one batch: the outputs of both, and all that the inspected file gave."""

    arguments: ForwardArguments
    expected: list[Array]
    results: list[Array]
    values: list[Array]


class Comparison:
    """Compares a file with its model.

    Args:
        quantized: The model.
        forward: Its forward, as the file has it.
        inspected: A session of the file with the rounded tensors as outputs after its own.
        rounded: These tensors.
        ends: Names of the file's outputs.
    """

    def __init__(
        self,
        quantized: HookedModel,
        forward: Callable[..., Any],
        inspected: Any,
        rounded: Mapping[str, list[QuantizeNode]],
        ends: Sequence[str],
    ) -> None:
        self._quantized, self._forward, self._inspected, self._ends = quantized, forward, inspected, list(ends)
        self._rounded = rounded
        self._names = [entry.tensor for entries in rounded.values() for entry in entries]
        self.local = LocalRun(quantized, rounded)
        self.outputs: Outputs | None = None

    def anew(self) -> Comparison:
        """Another comparison of the same two, which has found nothing yet."""
        return Comparison(self._quantized, self._forward, self._inspected, self._rounded, self._ends)

    def run(self, arguments: ForwardArguments, feeds: Mapping[str, Array], plain: Any = None) -> Run:
        """Run both on a batch.

        Args:
            arguments: The batch.
            feeds: The same by the file's names.
            plain: Another session of the file, which gives the results; `None`: the inspected one does.
        """
        args, kwargs = arguments
        expected = arrays_of(self._forward(*args, **kwargs))
        values = self._inspected.run(None, feeds)
        results = values[: len(self._ends)] if plain is None else plain.run(None, feeds)
        return Run(arguments, expected, results, values)

    def add(self, run: Run) -> None:
        """Compare what was run: in the model, each layer goes on from the engine's tensors."""
        args, kwargs = run.arguments
        with self.local.going_on_from(dict(zip(self._names, run.values[len(self._ends) :], strict=True))):
            going_on = arrays_of(self._forward(*args, **kwargs))
        if self.outputs is None:
            self.outputs = Outputs(self._ends, class_axes(self._quantized.graph, [array.shape for array in run.expected]))
        self.outputs.add(run.expected, run.results, going_on, run.values[: len(self._ends)])

    def tell(self, report: ExportReport) -> None:
        """Write into a report what was found."""
        tell(report, self.local, self.outputs)
