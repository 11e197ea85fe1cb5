"""Runs a file in the engine that it is for, where that is installed: whether it loads, what it computes in INT8, and whether each layer is right there too."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.export.check_limits import judge, refuse_floats
from lightning_cco.export.engine_patterns import adds_products_exactly
from lightning_cco.export.engines import Engine, Loaded
from lightning_cco.export.errors import ExportError, FileDiffers
from lightning_cco.export.island_kinds import IslandKind
from lightning_cco.export.local_check import LocalRun
from lightning_cco.export.ort_session import QuantizeNode
from lightning_cco.export.outputs import Arrays, Outputs
from lightning_cco.export.planned_floats import Executed, planned_floats
from lightning_cco.export.qdq_emitter import Emitter
from lightning_cco.export.report import ExportReport, LayerDifference
from lightning_cco.export.value_types import computes
from lightning_cco.names import module_of

_INTEGER = ("u8", "i8")
_FLOATS = ("f32", "f16", "bf16")
_WEIGHTS = (*_INTEGER, "u4", "i4")
_SATURATES = "without them the sum of two int8 products saturates in 16 bits"
_ALIKE_DB = 30.0
"""Below this, a file that gives other outputs once its rounded tensors are outputs as well is worth a warning."""


@dataclass
class Case:
    """One batch of the check.

    Attributes:
        feeds: Arrays by the file's names of its inputs.
        expected: The fake-quantized model's outputs.
        forward: Runs the fake-quantized model on it once more.
    """

    feeds: dict[str, np.ndarray[Any, Any]]
    expected: Arrays
    forward: Callable[[], Arrays]


def installed(engine: Engine) -> bool:
    """Whether an engine can be run here."""
    return engine.load is not None and importlib.util.find_spec(engine.package) is not None


def check_in_target(
    path: Path,
    inspected: Path,
    written: Any,
    emitter: Emitter,
    cases: Sequence[Case],
    rounded: Mapping[str, list[QuantizeNode]],
    report: ExportReport,
) -> None:
    """Fill in what the engine makes of a file.

    Args:
        path: The file.
        inspected: The file with its rounded tensors as further outputs.
        written: The loaded file.
        emitter: What wrote it.
        cases: What to run it on.
        rounded: Its quantize nodes by quantizer name.
        report: Filled in place.

    Raises:
        CCOError: The engine can't load or run the file, or a layer is wrong in it.
    """
    engine = emitter.stored.engine
    if engine.load is None:
        return
    if not installed(engine):
        report.notes.append(f"{engine.title} is not installed, so the file was run in ONNX Runtime only: pip install {engine.package}")
        return
    report.target = f"{engine.title} {importlib.metadata.version(engine.package)}"
    names = [entry.tensor for entries in rounded.values() for entry in entries]
    local = LocalRun(emitter.quantized, rounded)
    outputs = Outputs([entry.name for entry in report.outputs], [entry.class_axis for entry in report.outputs])
    alike = Outputs(outputs.names, outputs.axes)
    try:
        whole, open_ = engine.load(path), engine.load(inspected)
        for case in cases:
            results = whole.run(case.feeds)
            values = open_.run(case.feeds)
            tensors = dict(zip(names, values[len(results) :], strict=True))
            with local.going_on_from(tensors):
                going_on = case.forward()
            outputs.add(case.expected, results, going_on, values[: len(results)])
            alike.add(values[: len(results)], results, results, results)
    except CCOError:
        raise
    except Exception as error:
        raise ExportError(_unloadable(report.target, written, emitter, error)) from error
    _count(whole, written, emitter, report)
    report.target_sqnr_db = outputs.sqnr_db
    report.notes += [engine.remark] if engine.remark else []
    _judge(local, outputs, alike, emitter, report)
    if engine.strict:
        refuse_floats(report)


def _judge(local: LocalRun, outputs: Outputs, alike: Outputs, emitter: Emitter, report: ExportReport) -> None:
    """Refuse what is wrong in the engine, by the limits of the check in ONNX Runtime."""
    own = ExportReport(report.path, outputs=outputs.differences(), widened=report.widened)
    for key, steps in local.steps.items():
        count = max(1, steps.count)
        own.layers.append(LayerDifference(key, steps.largest, steps.total / count, steps.far / count, steps.count))
    report.target_largest_steps = own.largest_steps
    try:
        judge(own, limits=emitter.stored.engine.limits)
    except FileDiffers as error:
        if emitter.stored.overflows_without_vnni and not adds_products_exactly():
            report.notes.append(
                f"in {report.target} the outputs agree at {report.target_sqnr_db:.1f} dB only: this processor has no VNNI instructions, and {_SATURATES}"
            )
            return
        raise FileDiffers(error.what, report.target) from error
    if alike.sqnr_db < _ALIKE_DB and report.target_sqnr_db < report.sqnr_db - 10:
        warnings.warn(
            f"export: {report.target} gives outputs at {report.target_sqnr_db:.1f} dB of the fake-quantized model's, ONNX Runtime at {report.sqnr_db:.1f}, "
            "although each layer alone is right: one of the operators that it fuses may be wrong. Compare on your own data before deploying.",
            CCOWarning,
            stacklevel=5,
        )


def _count(loaded: Loaded, written: Any, emitter: Emitter, report: ExportReport) -> None:
    """What the engine computes in INT8, and which layers it computes in float that are planned in INT8."""
    layers, computing = _layers(written.graph.node, emitter), _layers(filter(computes, written.graph.node), emitter)
    planned = emitter.quantized.plan.quantized
    integer: Counter[str] = Counter()
    as_they_are: set[str] = set()
    others: Counter[str] = Counter()
    executed: list[Executed] = []
    for node in loaded.computed():
        if not (node.product or node.computes):
            continue
        names = [_plain(name) for name in node.names]
        others[node.operator] += node.precision in _FLOATS
        found = next((layers[name] for name in names if name in layers), "")
        if node.product and found in emitter.quantized.plan.weight_only:
            if node.precision in _WEIGHTS:
                integer[f"{node.operator} with weights in {node.precision}"] += 1
                as_they_are.add(found)
            continue
        own = tuple(dict.fromkeys(computing[name] for name in names if name in computing))
        on_integers = node.precision in _INTEGER and (node.product or not planned.isdisjoint(own))  # truth values are u8 too
        if on_integers or node.precision in _FLOATS:
            executed.append(Executed(node.operator, own, on_integers))
        integer[node.operator] += on_integers
    report.target_nodes, report.target_floats = dict(+integer), dict(+others)
    products = [name for name, block in emitter.stored.blocks.items() if block.as_it_is]
    report.in_groups, report.as_floats = len(products), [name for name in products if name not in as_they_are]
    if as_they_are and emitter.stored.engine.rounds_as_it_runs:
        report.notes.append(emitter.stored.engine.rounds_as_it_runs)
    report.zero_points = sum(emitter.stored.blocks[name].zeros is not None for name in products if name in as_they_are)
    report.float_islands = [entry for entry in report.float_islands if entry.kind is not IslandKind.IN_ORT_ALONE]
    report.float_islands += planned_floats(emitter.quantized, executed, report.target)


def _layers(nodes: Iterable[Any], emitter: Emitter) -> dict[str, str]:
    """The layers of nodes, by the nodes' names and by those of what they make."""
    return {name: emitter.layers[node.name] for node in nodes if node.name in emitter.layers for name in (node.name, *node.output)}


def _plain(name: str) -> str:
    return name.partition("/")[0]


def _unloadable(title: str, written: Any, emitter: Emitter, error: Exception) -> str:
    """A message for a file that the engine refuses, with the layer whose operator it names."""
    text = " ".join(str(error).split())
    layer = next((layer for name, layer in _names(written.graph.node, emitter) if re.search(rf"\b{re.escape(name)}\b", text)), "")
    where = f" at layer '{layer}' ({module_of(emitter.quantized.graph[layer].path)})" if layer in emitter.quantized.graph else ""
    told = text[text.find("-- ") :] if "-- " in text else text
    return (
        f"{title}, the target, can't run the file{where}: {told[:400]}. No file was written. Replace that layer by operations that the engine "
        "has, leave it out of the exported module, or choose another target_framework. check=False writes the file unchecked."
    )


def _names(nodes: Any, emitter: Emitter, layer: str = "") -> list[tuple[str, str]]:
    """Names of nodes and of what they make, also inside of loops and branches, each with its layer."""
    found = []
    for node in nodes:
        own = emitter.layers.get(node.name, layer)
        found += [(name, own) for name in (node.name, *node.output) if name and own]
        for attribute in node.attribute:
            found += _names(attribute.g.node, emitter, own)
    return found
