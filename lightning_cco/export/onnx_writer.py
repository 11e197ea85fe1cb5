"""Traces a model, converts what was traced, and rewrites the graph for the engine that the file is for."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lightning_cco.compat.onnx_exporter import LOGGERS
from lightning_cco.compat.recurrent import shapes_of_sequences
from lightning_cco.export import onnx_passes
from lightning_cco.export.deployed_forward import Deployed
from lightning_cco.export.dialects import OnnxDialect
from lightning_cco.export.dynamic_axes import Axes, check_axis_names, name_axes, ways_to_vary
from lightning_cco.export.dynamic_sizes import Sizes, limits_of, refuse_long_sizes
from lightning_cco.export.engines import ENGINES, FileFeature
from lightning_cco.export.errors import ExportError, VaryingSizesCost
from lightning_cco.export.failures import failed, inexpressible, kind_of
from lightning_cco.export.named_axes import bounds_of
from lightning_cco.export.provenance import layers_of_nodes
from lightning_cco.export.qdq_emitter import Emitter
from lightning_cco.export.recurrent_translations import translations
from lightning_cco.export.report import ExportReport
from lightning_cco.export.rewriting import rewrite
from lightning_cco.export.stored_tensors import StoredWeights
from lightning_cco.export.trace_attempts import first_emitted
from lightning_cco.export.tracing import ONE_AT_A_TIME, traced_program
from lightning_cco.quantization.model import HookedModel
from lightning_cco.version import __version__

INT4_OPSET = 21
OPSET = ENGINES["ort"].amount(FileFeature.OPSET, INT4_OPSET)
"""Whatever the target: each file is run in ONNX Runtime."""


def write_onnx(
    quantized: HookedModel,
    deployed: Deployed,
    path: Path,
    dynamic_batch: bool,
    int4: bool,
    options: dict[str, Any],
    sizes: Sizes,
    at_any_price: bool,
    report: ExportReport,
) -> tuple[Emitter, list[str]]:
    """Write the file, with the report's inputs; what wrote it, and what is to be said of axes that do not vary freely."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    grouped = any(quantizers[0].in_rows for quantizers in quantized.weights.values())
    opset = options.get("opset_version", INT4_OPSET if int4 or grouped else OPSET)
    inputs, outputs = list(options.get("input_names", [])), list(options.get("output_names", []))
    _complete(inputs, deployed.names, "input")
    _complete(outputs, deployed.outputs, "output")
    if options.get("dynamic_axes") is not None:
        check_axis_names(options["dynamic_axes"], inputs + deployed.names, outputs + deployed.outputs)
    stored = StoredWeights(quantized, int4)
    emitter = Emitter(quantized, stored, OnnxDialect(opset))
    emitter.model = deployed
    with ONE_AT_A_TIME, _quietly(), shapes_of_sequences():
        free = bool(sizes) and not at_any_price
        emitter.look = refuse_long_sizes if free else None
        ways = ways_to_vary(deployed, dynamic_batch, options, inputs, sizes)
        traced, axes = first_emitted(deployed, emitter, ways, lambda axes: _traced(deployed, emitter, axes, free))
        conversion = {name: options[name] for name in ("verbose", "optimize") if name in options}
        table = {**translations(), **(options.get("custom_translation_table") or {})}
        try:
            program = torch.onnx.export(
                traced, dynamo=True, opset_version=opset, custom_translation_table=table, **{"verbose": False, **conversion}
            )
        except Exception as error:
            raise kind_of(error)(inexpressible(quantized.model, error)) from error
    assert program is not None
    emitter.warn_of_missing()
    graph = program.model.graph
    written = graph.opset_imports.get("", opset)
    if written != opset:  # the exporter leaves the opset that it works in where its converter fails
        raise ExportError(
            f"opset_version={opset} can't be written for this model: its operators need opset {written}. Leave opset_version out."
        )
    try:
        report.widened = rewrite(graph, stored.engine, int4, grouped)
        RemoveUnusedNodesPass()(program.model)  # what the passes before put something else in place of
        onnx_passes.name_nodes(graph)
        emitter.layers = layers_of_nodes(graph, program.exported_program)
        emitter.modules = onnx_passes.take_modules(graph)
        onnx_passes.name_parameters(graph)
        onnx_passes.free_names(graph, inputs + outputs)
        onnx_passes.name_inputs(graph, inputs)
        onnx_passes.name_outputs(graph, outputs)
        fixed = name_axes(graph, axes)
        onnx_passes.drop_traces(graph)
    except Exception as error:
        raise ExportError(failed("rewriting the exporter's graph", error)) from error
    program.model.metadata_props.update(
        {
            "lightning_cco.version": __version__,
            "lightning_cco.quantized_layers": json.dumps(sorted(quantized.plan.quantized)),
            "lightning_cco.skipped_layers": json.dumps(quantized.plan.skipped),
            "lightning_cco.recipe": json.dumps(quantized.settings.to_dict()),
        }
    )
    saving = {name: options[name] for name in ("external_data",) if name in options}
    program.save(str(path), **saving)
    report.inputs = {str(value.name): [_size(size) for size in value.shape or ()] for value in graph.inputs}
    said = [f"fixed, since the model ties them to fixed sizes: {'; '.join(fixed)}"] if fixed else []
    limits = limits_of(traced, inputs)
    asked = options.get("dynamic_shapes") is not None
    if asked or options.get("dynamic_axes") is not None:
        emitter.bounds = bounds_of(traced)
    report.batch_limits += [words for words, axis in limits.items() if axis == 0 and not asked]
    return emitter, said + ([f"sizes within which the file holds: {'; '.join(limits)}"] if limits else [])


def _complete(given: list[str], names: list[str], what: str) -> None:
    """Add the names of tensors that the user has given none."""
    if len(given) > len(names):
        raise ExportError(f"{what}_names has {len(given)} names, but the file has {len(names)} {what}s: {names}.")
    given += names[len(given) :]


def _size(size: Any) -> int | str:
    """A number, or the name of an axis that varies."""
    return size if isinstance(size, int) else str(size.value)


def _traced(deployed: Deployed, emitter: Emitter, axes: Axes, free: bool) -> torch.export.ExportedProgram:
    """One way of tracing; ``free``: only if it costs nothing that sizes vary."""
    if free and emitter.stored.blocked:
        raise VaryingSizesCost("the first convolution then reads blocks of 2 x 2 pixels, which is faster")
    with emitter.emitting():
        return traced_program(deployed, axes.tensors, None, (tuple(axes.specifications),))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the exporter's own remarks from the user's terminal."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
