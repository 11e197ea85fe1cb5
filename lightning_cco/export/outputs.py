"""Compares the outputs of a file with the model's: noise, arg-max over the axis of the classes, and from the engine's own rounded tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_cco.export.errors import BatchDoesNotVary
from lightning_cco.export.local_check import LocalRun
from lightning_cco.export.report import ExportReport, LayerDifference, OutputDifference
from lightning_cco.graph.containers import tensors_in
from lightning_cco.graph.layer import Layer
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.graph.ops import Category, operation_of_kind
from lightning_cco.names import list_names

Arrays = list["np.ndarray[Any, Any]"]
_EPSILON = float(np.finfo(np.float32).eps)


class Outputs:
    """What is added up over the batches.

    Args:
        names: Of the file's outputs.
        axes: For each, the axis of its classes; `None`: it has none.
    """

    def __init__(self, names: list[str], axes: list[int | None]) -> None:
        self.names, self.axes = names, axes
        self.sums = [_Sums() for _ in names]

    def add(self, expected: Arrays, results: Arrays, local: Arrays, inspected: Arrays) -> None:
        """Take a batch in.

        Args:
            expected: The fake-quantized model's outputs.
            results: The file's.
            local: The fake-quantized model's, going on from the engine's rounded tensors.
            inspected: The file's in the same run as those.

        Raises:
            BatchDoesNotVary: The numbers of outputs, or their shapes, are not the same.
        """
        shapes = [array.shape for array in expected], [array.shape for array in results]
        if shapes[0] != shapes[1]:
            raise BatchDoesNotVary(
                f"the file's outputs {list_names(self.names)} have the shapes {shapes[1]}, the model's {shapes[0]}. No file was written. "
                "If the model gives another number of tensors in evaluation, export it in that mode; if a size is fixed in the code, pass dynamic_batch=False."
            )
        for sums, axis, *arrays in zip(self.sums, self.axes, expected, results, local, inspected, strict=True):
            sums.add(axis, *arrays)

    def differences(self) -> list[OutputDifference]:
        """One for each output."""
        return [
            OutputDifference(
                name,
                _decibels(sums.signal, sums.noise),
                _varying([sums]),
                sums.largest,
                sums.absolute / max(1, sums.count),
                sums.local / sums.size if sums.size > 0 else (0.0 if sums.local == 0 else math.inf),
                axis,
                sums.agreeing / sums.rows if sums.rows else math.nan,
                sums.integers,
            )
            for name, axis, sums in zip(self.names, self.axes, self.sums, strict=True)
        ]

    @property
    def sqnr_db(self) -> float:
        """Of all outputs together."""
        return _decibels(sum(s.signal for s in self.sums), sum(s.noise for s in self.sums))

    @property
    def mean_difference(self) -> float:
        """Mean absolute difference of all outputs."""
        return sum(s.absolute for s in self.sums) / max(1, sum(s.count for s in self.sums))

    @property
    def varying_sqnr_db(self) -> float:
        """Of what differs between the samples of a batch, all outputs together."""
        return _varying(self.sums)


def _varying(sums: Sequence[_Sums]) -> float:
    """NaN where no batch had two samples, between which something could differ."""
    if not any(s.several for s in sums):
        return math.nan
    return _decibels(sum(s.varying for s in sums), sum(s.noise_of_several for s in sums))


class _Sums:
    """Of one output."""

    def __init__(self) -> None:
        self.several = self.integers = False
        self.noise = self.noise_of_several = self.signal = self.varying = self.absolute = self.largest = self.local = self.size = 0.0
        self.count = self.rows = self.agreeing = 0

    def add(self, axis: int | None, expected: Any, result: Any, local: Any, inspected: Any) -> None:
        self.integers = discrete = expected.dtype.kind in "biu"
        if axis is not None and expected.size and expected.ndim > axis:
            same = expected.argmax(axis) == result.argmax(axis)
            self.agreeing, self.rows = self.agreeing + int(same.sum()), self.rows + same.size
        expected, result, local, inspected = (array.astype(np.float64) for array in (expected, result, local, inspected))
        with np.errstate(invalid="ignore"):  # equal infinities and what is not a number on both sides differ by nothing
            difference, distance = _distance(expected, result), _distance(local, inspected)
            finite = np.where(np.isfinite(expected), expected, 0.0)
        self.noise += float(np.square(difference).sum())
        self.signal += float(np.square(finite).sum())
        if finite.ndim and len(finite) > 1:
            self.several = True
            deviation = float(np.square(finite - finite.mean(0)).sum())
            # A mean of equal values is not quite one of them.
            self.varying += deviation if deviation > _EPSILON**2 * float(np.square(finite).sum()) else 0.0
            self.noise_of_several += float(np.square(difference).sum())
        self.absolute += float(difference.sum())
        self.count += difference.size
        self.largest = max(self.largest, float(difference.max(initial=0.0)))
        # Of numbers that are counted or true, the share that differs; of others the largest difference beside the largest value.
        self.local = max(self.local, float((distance > 0).mean()) if discrete and distance.size else float(distance.max(initial=0.0)))
        self.size = max(self.size, 1.0 if discrete else float(np.abs(finite).max(initial=0.0)))


def _distance(one: Any, other: Any) -> Any:
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    return np.where(same, 0.0, np.nan_to_num(np.abs(one - other), nan=np.inf))


def _decibels(signal: float, noise: float) -> float:
    if not math.isfinite(noise):
        return -math.inf
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def class_axes(graph: LayerGraph, shapes: list[tuple[int, ...]]) -> list[int | None]:
    """The axis of each output along which its classes lie.

    That of the channels if a convolution made the output, the last one if a linear layer did: found again by its size where what is in between moves axes.

    Args:
        graph: The model's layers.
        shapes: Shape of each output.
    """
    ends = [layer for layer in graph if layer.kind == "output"]
    return [_class_axis(graph, ends[number] if number < len(ends) else None, shape) for number, shape in enumerate(shapes)]


def _class_axis(graph: LayerGraph, end: Layer | None, shape: tuple[int, ...]) -> int | None:
    if len(shape) < 2:
        return None
    usual = 1 if len(shape) == 4 else len(shape) - 1
    source = _maker(graph, end.name) if end is not None else None
    if source is not None and source.output_shapes:
        made = source.output_shapes[0]
        images = source.kind in ("conv", "conv_transpose") and len(made) >= 3
        size = made[1] if images else made[-1]
        usual = 1 if images else len(shape) - 1
        if shape[usual] != size:
            usual = next((axis for axis in (1, len(shape) - 1, *range(2, len(shape))) if shape[axis] == size), usual)
    return usual if shape[usual] > 1 else None


def _maker(graph: LayerGraph, name: str) -> Layer | None:
    """The last layer with weights before an output."""
    pending, seen = list(graph.predecessors(name)), set()
    while pending:
        layer = graph[pending.pop(0)]
        if layer.name in seen:
            continue
        seen.add(layer.name)
        if operation_of_kind(layer.kind).category in (Category.WEIGHTED, Category.MATMUL):
            return layer
        pending += graph.predecessors(layer.name)
    return None


def arrays_of(outputs: Any) -> list[np.ndarray[Any, Any]]:
    """The tensors of an output as arrays, floats in float32."""
    found = (tensor.detach().cpu() for _, tensor in tensors_in(outputs))
    return [tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy() for tensor in found]


def tell(report: ExportReport, local: LocalRun, outputs: Outputs | None) -> None:
    """Fill into a report what a comparison layer by layer and of the outputs found; ``outputs``: `None` where nothing ran."""
    for key in [key for key in local.rounded if key in local.steps]:
        steps = local.steps[key]
        count = max(1, steps.count)
        report.layers.append(LayerDifference(key, steps.largest, steps.total / count, steps.far / count, steps.count))
    if outputs is None:
        return
    report.uncompared = local.uncompared()
    if local.of_no_output:
        report.notes.append(f"no output depends on {list_names(local.of_no_output, 8)}: what only these need is not in the file")
    report.outputs = outputs.differences()
    report.sqnr_db, report.varying_sqnr_db = outputs.sqnr_db, outputs.varying_sqnr_db
    report.largest_difference = max((entry.largest_difference for entry in report.outputs), default=float("nan"))
    report.mean_difference = outputs.mean_difference
    report.agreement = report.outputs[0].agreement if report.outputs else float("nan")
