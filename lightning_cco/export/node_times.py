"""How long ONNX Runtime takes for each layer of files, and for the conversions between them: measured by turns, in one process."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, thread_time
from typing import Any

import numpy as np

from lightning_cco.export.ort_session import engine_session
from lightning_cco.export.provenance import NodeLayers

_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear", "ReorderInput", "ReorderOutput")
"""Operators that compute nothing: between floats and integers, and between the orders of channels that kernels want."""
_KERNEL = "_kernel_time"
_BUDGET, _MOST_ROUNDS, _FEWEST_ROUNDS = 10.0, 400, 15
"""Seconds for all files together, and how often each is run at most and at least."""
_LEAST = 1e-6
"""What any node takes: to be called."""


@dataclass
class Written:
    """What a file was written of.

    Attributes:
        path: Where it is.
        layers: Layer of each of its nodes, by the node's name.
        example: What it was traced with, in the order of its inputs.
    """

    path: Path
    layers: Mapping[str, str] = field(default_factory=dict)
    example: Sequence[np.ndarray[Any, Any]] = ()


@dataclass
class FileTimes:
    """What one run of a file takes, in seconds.

    Attributes:
        total: All of it, without a profiler.
        layers: What each layer computes, by the names of layers; fused operators count for one of theirs.
        entering: Conversions to integers after a layer in float, by the name of that layer.
        leaving: Conversions to floats after a layer in integers, likewise.
    """

    total: float = 0.0
    layers: dict[str, float] = field(default_factory=dict)
    entering: dict[str, float] = field(default_factory=dict)
    leaving: dict[str, float] = field(default_factory=dict)


def time_files(files: Mapping[str, Written], threads: int, batch_size: int) -> dict[str, FileTimes]:
    """Measure files by turns, so that whatever slows the machine down slows all of them.

    Totals are medians over the turns; for all files but the first, of the ratio to the first in the same turn. With one thread they are processor
    time, of which other programs take nothing; with more, wall time. What the profiler says of single nodes is its own cost less, so that the nodes of a
    file take its total.

    Args:
        files: The files by any names.
        threads: Threads of ONNX Runtime.
        batch_size: Samples of the examples that they are run on, where that varies in a file.
    """
    import onnx

    clock = thread_time if threads == 1 else perf_counter
    found, sessions = {}, {}
    with TemporaryDirectory() as folder:
        for number, (name, file) in enumerate(files.items()):
            optimized = str(Path(folder) / f"{number}.onnx")
            options: dict[str, Any] = {"intra_op_num_threads": threads}
            profile: dict[str, Any] = {"enable_profiling": True, "profile_file_prefix": str(Path(folder) / f"profile_{number}")}
            profiled = engine_session(str(file.path), optimized_model_filepath=optimized, **profile, **options)
            sessions[name] = engine_session(str(file.path), **options), profiled, optimized
        inputs = {name: _feeds(plain, files[name].example, batch_size) for name, (plain, _, _) in sessions.items()}
        taken: dict[str, list[float]] = {name: [] for name in files}
        names, began = list(files), perf_counter()
        for turn in range(_MOST_ROUNDS + 1):
            if turn > _FEWEST_ROUNDS and perf_counter() - began > _BUDGET:
                break
            for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
                plain, profiled, _ = sessions[name]
                profiled.run(None, inputs[name])
                plain.run(None, inputs[name])  # in its caches again
                start = clock()
                plain.run(None, inputs[name])
                taken[name].append(clock() - start)
        first = statistics.median(taken[names[0]][1:])
        for name, (_, profiled, optimized) in sessions.items():
            nodes = _nodes(Path(profiled.end_profiling()))
            written = onnx.load(str(files[name].path), load_external_data=False)
            graph = onnx.load(optimized, load_external_data=False).graph
            total = first * statistics.median(one / other for one, other in zip(taken[name][1:], taken[names[0]][1:], strict=True))
            found[name] = _attributed(total, nodes, graph, NodeLayers(written, files[name].layers, graph))
    return found


def _feeds(session: Any, example: Sequence[np.ndarray[Any, Any]], batch_size: int) -> dict[str, np.ndarray[Any, Any]]:
    found = {}
    for entry, array in zip(session.get_inputs(), example, strict=True):
        for axis, size in enumerate(entry.shape):
            if size == "batch":
                array = np.take(array, np.arange(batch_size) % array.shape[axis], axis)
        found[entry.name] = np.ascontiguousarray(array)
    return found


def _nodes(profile: Path) -> dict[str, float]:
    """Median seconds of each node of a profile, by its name."""
    durations: dict[str, list[float]] = {}
    for event in json.loads(profile.read_text()):
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            durations.setdefault(event["name"].removesuffix(_KERNEL), []).append(event["dur"] * 1e-6)
    return {name: statistics.median(values) for name, values in durations.items()}


def _attributed(total: float, nodes: Mapping[str, float], graph: Any, layers: NodeLayers) -> FileTimes:
    """The times of a file's layers and conversions, which together take its total."""
    found = FileTimes(total)
    net = _net(nodes, total)
    maker: dict[str, tuple[str, str]] = {}
    for node in graph.node:
        layer, seconds = layers.of(node), net.get(node.name, 0.0)
        if not _converts(node):
            found.layers[layer] = found.layers.get(layer, 0.0) + seconds
            maker.update(dict.fromkeys(node.output, (layer, "")))
            continue
        before, kind = maker.get(node.input[0], ("", ""))
        named = re.match(r"(.+?)(?:\.\d+)?_(?:de)?quantize(?:/duplicated)?", node.name)
        before = (
            named.group(1).partition(":")[0] if named and not before else before
        )  # an input of the model: quantize nodes have the names of their tensors
        kind = {"QuantizeLinear": "entering", "DequantizeLinear": "leaving"}.get(node.op_type, kind)
        maker.update(dict.fromkeys(node.output, (before, kind)))
        # What only moves channels stands before a conversion or after one; where there is none it is the layer's own.
        kind = kind or _kind_behind(node, graph)
        into = {"entering": found.entering, "leaving": found.leaving}.get(kind, found.layers)
        into[before or layer] = into.get(before or layer, 0.0) + seconds
    return found


def _net(nodes: Mapping[str, float], total: float) -> dict[str, float]:
    """The times of nodes less what the profiler itself takes for each, the same for all, so that they come to the total; none is less than `_LEAST`."""
    low, high = 0.0, max(nodes.values(), default=0.0)
    for _ in range(50):
        cost = (low + high) / 2
        low, high = (cost, high) if sum(_without(value, cost) for value in nodes.values()) > total else (low, cost)
    net = {name: _without(value, high) for name, value in nodes.items()}
    scale = total / max(1e-12, sum(net.values()))
    return {name: value * scale for name, value in net.items()}


def _without(value: float, cost: float) -> float:
    return max(value - cost, min(value, _LEAST))


def _converts(node: Any) -> bool:
    return node.op_type in _CONVERSIONS or (node.op_type == "Transpose" and node.name.startswith("Transpose"))


def _kind_behind(node: Any, graph: Any) -> str:
    """Which conversion follows a node that moves channels; empty if none does."""
    reading = [other for other in graph.node if set(node.output).intersection(other.input)]
    for other in reading:
        if other.op_type in ("QuantizeLinear", "DequantizeLinear"):
            return "entering" if other.op_type == "QuantizeLinear" else "leaving"
    return next((kind for other in reading if _converts(other) and (kind := _kind_behind(other, graph))), "")
