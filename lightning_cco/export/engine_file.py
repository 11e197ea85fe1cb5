"""Writes a model as the file of an engine that reads programs (``.pte``, …), and checks it in that engine."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_cco.export.batch_chunks import MOST_SAMPLES, Samples, left_out_of_the_check
from lightning_cco.export.check_limits import judge, refuse_floats
from lightning_cco.export.deployed_forward import deployed_forward
from lightning_cco.export.destination import export_target, move
from lightning_cco.export.dynamic_axes import Axes
from lightning_cco.export.engines import BY_ENDING, Converted, Engine, Reader
from lightning_cco.export.errors import ExportError
from lightning_cco.export.failures import first_paragraph, need_engine, need_writable_names
from lightning_cco.export.feeds import call_of
from lightning_cco.export.island_kinds import FloatIsland, IslandKind
from lightning_cco.export.layouts import in_usual_layout
from lightning_cco.export.onnx_notes import notes_on_bits, warn_of_empty_inputs
from lightning_cco.export.outputs import arrays_of
from lightning_cco.export.planned_floats import Executed, planned_floats
from lightning_cco.export.precision import float_bytes, in_float32
from lightning_cco.export.program import example_of
from lightning_cco.export.provenance import LAYER, noted
from lightning_cco.export.pt2e_check import Comparison, RecordedProgram, levels_of
from lightning_cco.export.pt2e_passes import operator_of
from lightning_cco.export.pt2e_writer import WrittenProgram, write_program
from lightning_cco.export.report import ExportReport
from lightning_cco.export.step_network import StepNetwork
from lightning_cco.export.variations import varied
from lightning_cco.files import temporary_folder
from lightning_cco.graph.compiled import eager
from lightning_cco.graph.ops import Category, operation_of_kind
from lightning_cco.names import list_names
from lightning_cco.quantization.model import HookedModel


def export_engine_file(
    quantized: HookedModel,
    path: str | Path,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    batches: Iterable[Any] = (),
    batch_size: int = 1,
    check: bool = True,
    min_sqnr_db: float | None = None,
    max_mean_steps: float | None = None,
    network: StepNetwork | None = None,
    **options: Any,
) -> ExportReport:
    """Write the INT8 file of an engine that reads programs, run it there, and compare it with the fake-quantized model layer by layer.

    Sizes are fixed: those of the example, with ``batch_size`` samples.

    Args:
        quantized: The calibrated model, planned for the engine (``target_framework``).
        path: Where to write; its ending tells the engine.
        example_args: Positional arguments of one forward.
        example_kwargs: Keyword arguments of it.
        batches: Batches to check the file on, as in `QuantizedModel.calibrate`, split to its batch size; by default the example.
        batch_size: The batch size of the file.
        check: Run the file.
        min_sqnr_db: The check fails below this SQNR of the outputs from end to end; `None`: only the comparison layer by layer counts.
        max_mean_steps: The check fails if a quantized tensor is further off than this on average, in steps of its scale; `None`: the engine's limit.
        network: The part of a training step to export instead of the model's ``forward``; the example is then for it (`network_of_the_step`).
        **options: There are no others; what only an ONNX file has is refused by name.

    Raises:
        CCOError: The engine is missing, the model was planned for another or never calibrated, can't be traced or converted, a layer is wrong in the file or
            is computed in float though it is planned in INT8, or the path can't be written; then no file is left.
    """
    engine = BY_ENDING[Path(path).suffix.lower()]
    if options:
        raise ExportError(
            f"a {engine.ending} file takes the options batches, batch_size, check, min_sqnr_db and max_mean_steps; got {sorted(options)}. "
            "Leave them out, or export an .onnx file."
        )
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ExportError(f"batch_size: expected a number of samples of at least 1, got {batch_size!r}. Write batch_size=1.")
    _need_plan(quantized, engine)
    need_engine(engine)
    args, kwargs = example_of(quantized, example_args, example_kwargs)
    need_writable_names(name for layer in quantized.graph for name in (layer.path, *layer.parameters))
    target = export_target(path, engine.ending)
    report = ExportReport(str(path), float_size_bytes=float_bytes(quantized.model))
    with in_float32(quantized.model) as types, in_usual_layout(quantized.model), quantized.evaluating(), eager():
        deployed = deployed_forward(quantized, args, kwargs, types, network)
        samples = Samples(deployed, batch_size)
        report.inputs = {name: list(tensor.shape) for name, tensor in zip(deployed.names, samples.example, strict=True)}
        written = write_program(quantized, deployed, [Axes(samples.example, [{} for _ in samples.example])], engine=engine)
        report.notes += samples.notes + notes_on_bits(quantized, written.emitter)
        report.widened = written.widened
        calls = [tensors for batch in batches if (tensors := deployed.tensors(*call_of(batch))) is not None] or [deployed.example]
        try:
            with temporary_folder(target.parent) as folder:
                temporary = folder / target.name
                reader = _started(engine)
                made = _converted(reader, engine, written.program, folder / "program.pt2", temporary)
                report.size_bytes = _size(temporary)
                _count(quantized, engine, made, report)
                if check and engine.reads_alone:
                    _check_program(quantized, written, samples, calls, report)
                    report.faults |= made.faults
                    report.notes.append(engine.reads_alone)
                elif check:
                    _check(quantized, engine, reader, written, temporary, samples, calls, report)
                if check:
                    judge(
                        report, min_sqnr_db, engine.limits if max_mean_steps is None else replace(engine.limits, mean_steps=max_mean_steps)
                    )
                    refuse_floats(report)
                warn_of_empty_inputs(report)
                move(temporary, target)
        except OSError as error:
            raise ExportError(f"'{path}' can't be written: {error}. Give a path in a folder that can be.") from error
    return report


def _size(path: Path) -> int:
    """Of a file, or of all that a folder holds."""
    parts = path.rglob("*") if path.is_dir() else [path]
    return sum(part.stat().st_size for part in parts if part.is_file())


def _need_plan(quantized: HookedModel, engine: Engine) -> None:
    planned = quantized.settings.deployment_settings.target_framework
    if planned not in (engine.name, *engine.plans):
        raise ExportError(
            f"{engine.ending} files are {engine.title}'s, but the model is planned for target_framework: {planned}, whose layers {engine.title} "
            f"computes otherwise. Write deployment_settings: {{target_framework: {engine.name}}} in the recipe before training, or export an .onnx file."
        )


def _started(engine: Engine) -> Reader:
    assert engine.start is not None
    try:
        return engine.start()
    except RuntimeError as error:
        raise ExportError(f"{engine.title} can't be loaded: {first_paragraph(error)}. {_reinstall(engine)}") from error


def _reinstall(engine: Engine) -> str:
    return f"Its versions go together with certain ones of torch: pip install 'lightning-cco[{engine.extra}]' in a separate environment."


def _converted(reader: Reader, engine: Engine, program: torch.export.ExportedProgram, between: Path, target: Path) -> Converted:
    torch.export.save(program, between)
    try:
        return reader.convert(between, target)
    except RuntimeError as error:
        said = first_paragraph(error)
        raise ExportError(
            f"{engine.title} {_version(engine)} can't convert the model{_refused(program, said)}: {said}. No file was written. Replace that operation by one "
            "that the engine has, leave it out of the exported module, or choose another target_framework. A .pt2 file can hold any operation."
        ) from error


def _refused(program: torch.export.ExportedProgram, said: str) -> str:
    """Where a program has the operators that an error names: ``aten.erf.default``, ``aten::erf`` or ``erf.default``."""
    layers: dict[str, None] = {}
    for node in program.graph.nodes:
        space, _, name = operator_of(node).partition("::")
        if not name:
            continue
        overload = re.escape(str(node.target).rpartition(".")[2])
        named = re.search(rf"\b{space}(\.|::){re.escape(name)}\b|(?<![\w.]){re.escape(name)}\.{overload}\b", said)
        if named and (layer := noted(node, LAYER)):
            layers[layer] = None
    return f" at {list_names(list(layers))}" if layers else ""


def _version(engine: Engine) -> str:
    try:
        return importlib.metadata.version(engine.package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return ""


def _count(quantized: HookedModel, engine: Engine, made: Converted, report: ExportReport) -> None:
    """What runs in INT8, what in float, and which layers that are planned in INT8 do not."""
    report.target = f"{engine.title} {_version(engine)}".strip()
    report.integer_nodes, report.float_nodes, report.conversions = dict(made.integer), dict(made.floats), made.conversions
    report.notes += made.notes
    plan, graph = quantized.plan, quantized.graph
    reached = {layer for _, layer, on_integers in made.layers if on_integers}
    unasked = sorted(layer for layer in reached if layer in plan.skipped and graph[layer].weighted)
    if unasked:
        report.unasked = unasked
        report.notes.append(
            f"the engine computes in INT8 what the plan leaves in float: {list_names(unasked)}. It rounds their weights itself, which the training has not "
            "seen: compare the file's metric with the model's"
        )
    report.target_nodes = dict(made.integer)
    executed = [Executed(operator, (layer,), on_integers) for operator, layer, on_integers in made.layers]
    report.float_islands += planned_floats(quantized, executed, report.target)
    products = {layer.name for layer in graph if operation_of_kind(layer.kind).category in (Category.WEIGHTED, Category.MATMUL)}
    left = {layer: operator for operator, layer, _ in reversed(made.layers) if layer in products - reached and layer in plan.skipped}
    report.float_islands += [
        FloatIsland(operator, (layer,), plan.skipped[layer], IslandKind.PLANNED) for layer, operator in reversed(left.items())
    ]


def _check_program(
    quantized: HookedModel, written: WrittenProgram, samples: Samples, calls: Sequence[tuple[Tensor, ...]], report: ExportReport
) -> None:
    """Run the program that a file was made of, in PyTorch, where the file can't be run."""
    program = RecordedProgram(written.program)
    comparison = Comparison(quantized, written.emitter, program.rounded, samples.deployed.outputs)
    pieces, left_out = samples.pieces(calls, MOST_SAMPLES)
    for tensors in pieces:
        results = arrays_of(program.run(tensors, {}))
        comparison.add(tensors, results, results, program.levels)
        report.batches += 1
    report.notes += left_out_of_the_check(left_out, len(calls))
    comparison.tell(report)
    if samples.size == 1:
        report.varying_sqnr_db = float("nan")  # nothing varies within one sample


def _check(
    quantized: HookedModel,
    engine: Engine,
    reader: Reader,
    written: WrittenProgram,
    path: Path,
    samples: Samples,
    calls: Sequence[tuple[Tensor, ...]],
    report: ExportReport,
) -> None:
    program, rounded = written.inspected()
    inspected = path.with_name(f"inspected{engine.ending}")
    _converted(reader, engine, program, path.with_name("inspected.pt2"), inspected)
    comparison = Comparison(quantized, written.emitter, rounded, samples.deployed.outputs)
    scales = {entry.tensor: entry.scale for entries in rounded.values() for entry in entries}
    pieces, left_out = samples.pieces(calls, MOST_SAMPLES)
    further = [piece for args, _ in varied(quantized, [(tensors, {}) for tensors in pieces[:1]]) for piece in [args]]
    for number, tensors in enumerate([*pieces, *further]):
        arrays = arrays_of(tensors)
        try:
            results, values = reader.run(path, arrays), reader.run(inspected, arrays)
        except RuntimeError as error:
            raise ExportError(
                f"{report.target} can't run the file: {first_paragraph(error)}. No file was written. Choose another target_framework, or leave the "
                "operation that it names out of the exported module. check=False writes the file unchecked."
            ) from error
        comparison.add(tensors, results, values[: len(results)], levels_of(values[len(results) :], scales))
        report.batches += number < len(pieces)
        report.variations += number >= len(pieces)
    report.notes += left_out_of_the_check(left_out, len(calls))
    comparison.tell(report)
    report.target_sqnr_db = report.sqnr_db
    if samples.size == 1:
        report.varying_sqnr_db = float("nan")  # nothing varies within one sample
