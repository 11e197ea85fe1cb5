"""Checks a file: what it stores against the model, what each layer computes in ONNX Runtime against fake-quantization, and its outputs from end to end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lightning_cco.errors import CCOError
from lightning_cco.export.batch_check import agree, check_other_batch
from lightning_cco.export.check_limits import judge
from lightning_cco.export.comparison import Comparison
from lightning_cco.export.dynamic_reads import DynamicReads
from lightning_cco.export.dynamic_sizes import other_sizes, takes
from lightning_cco.export.engines import FileFeature
from lightning_cco.export.errors import ExportError, SizesDoNotVary
from lightning_cco.export.failures import does_not_run
from lightning_cco.export.feeds import ForwardArguments, feeds_of, fits
from lightning_cco.export.float_islands import read_optimized
from lightning_cco.export.moving_operators import DRAWS
from lightning_cco.export.named_axes import check_named_axes
from lightning_cco.export.ort_session import engine_session, inspected_session, rounded_tensors
from lightning_cco.export.outputs import arrays_of
from lightning_cco.export.qdq_emitter import Emitter
from lightning_cco.export.report import ExportReport
from lightning_cco.export.stored_check import stored_faults
from lightning_cco.export.target_check import Case, check_in_target
from lightning_cco.export.variations import varied
from lightning_cco.quantization.model import HookedModel

_CASES = 2
"""How many batches the engine that a file is for is run on."""


def check_file(
    quantized: HookedModel, path: Path, emitter: Emitter, calls: Sequence[ForwardArguments], report: ExportReport, sizes: bool = False
) -> None:
    """Fill a report with what the file and runs of it show.

    Args:
        quantized: The model, the reference.
        path: The file.
        emitter: What wrote it.
        calls: What to run both on.
        report: Filled in place.
        sizes: Whether sizes vary in the file, so that it is run on others, too.

    Raises:
        SizesDoNotVary: It can't be run on them.
        BatchDoesNotVary: The batch varies in it, but it gives other outputs than the model with another one.
        CCOError: The file's outputs are not those of the model: another number, or another shape; or the engine that it is for refuses it.
    """
    import onnx

    optimized = path.with_name("optimized.onnx")
    with _refused(emitter):
        session = engine_session(str(path), optimized_model_filepath=str(optimized))
    written = onnx.load(str(path))
    report.random = sorted({node.op_type for node in written.graph.node if node.op_type in DRAWS})
    if report.random:
        report.notes.append(
            f"the file draws random numbers in every run ({', '.join(report.random)}), so its results differ from run to run"
        )
    read_optimized(quantized, onnx.load(str(optimized), load_external_data=False), written, emitter, report)
    reads = DynamicReads.of(written, emitter.layers, quantized.plan.dynamic)
    rounded = rounded_tensors(written, emitter.order) | reads.compared
    names = [entry.tensor for entries in rounded.values() for entry in entries]
    # What is for another engine or another processor is run as it is written: this processor may have no exact product for int8 weights.
    as_written = (
        not emitter.stored.engine.requires(FileFeature.UNSIGNED_WITHOUT_VNNI) or quantized.settings.deployment_settings.vnni is not None
    )
    with _refused(emitter):
        inspected = inspected_session(path, written, names, as_written, reads.nodes, reads.copies)
    compared = Comparison(quantized, emitter.model, inspected, rounded, [entry.name for entry in session.get_outputs()])
    cases: list[Case] = []
    misfits: list[dict[str, list[int]]] = []
    further = varied(quantized, calls)
    with quantized.evaluating():
        resized = _of_other_sizes(quantized, session, emitter, calls[0]) if sizes else []
        for number, (args, kwargs) in enumerate([*calls, *further, *resized]):
            feeds = feeds_of(session, args, kwargs)
            if not fits(session, feeds):
                if number < len(calls):
                    misfits.append({name: list(array.shape) for name, array in feeds.items()})
                continue
            try:
                ran = compared.run((args, kwargs), feeds, None if as_written else session)
            except Exception as error:
                if number < len(calls):
                    with _refused(emitter):
                        raise
                if number >= len(calls) + len(further):
                    raise SizesDoNotVary(f"the file does not run at other sizes: {error}. Leave dynamic_sizes out.") from error
                continue  # the model does not take this variation
            compared.add(ran)
            if len(cases) < _CASES:
                cases.append(Case(feeds, ran.expected, lambda args=args, kwargs=kwargs: arrays_of(emitter.model(*args, **kwargs))))  # type: ignore[misc]
            report.batches += number < len(calls)
            report.variations += number >= len(calls)
    report.notes += _left_out(session, misfits, len(calls))
    report.faults = stored_faults(quantized, written, emitter, rounded, compared.local.weights)
    compared.tell(report)
    try:
        judge(report)
    except CCOError:
        return  # wrong in ONNX Runtime already; whoever asked for the check says so
    with quantized.evaluating():
        plain = None if as_written else session
        check_other_batch(quantized, session, compared, calls[0], plain, report)
        if emitter.bounds:
            inputs = session.get_inputs()
            compare = partial(agree, quantized, session, compared, plain=plain, kind=SizesDoNotVary)
            check_named_axes(
                quantized,
                emitter.model,
                calls[0][0],
                [entry.name for entry in inputs],
                [entry.shape for entry in inputs],
                emitter.bounds,
                compare,
            )
        check_in_target(path, path.with_name("inspected.onnx"), written, emitter, cases, rounded, report)


@contextmanager
def _refused(emitter: Emitter) -> Iterator[None]:
    """Name the layer of what ONNX Runtime itself can't load or run."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.startswith("onnxruntime"):
            raise ExportError(does_not_run(emitter.layers, error)) from error
        raise


def _of_other_sizes(quantized: HookedModel, session: Any, emitter: Emitter, call: ForwardArguments) -> list[ForwardArguments]:
    """A batch of other sizes that the model takes; none if nothing but the batch varies in the file."""
    ways = other_sizes(call[0], [entry.shape for entry in session.get_inputs()])
    found = next((tensors for tensors in ways if takes(quantized, emitter.model, tensors)), None)
    if ways and found is None:
        raise SizesDoNotVary("the model took no other size that was tried. Leave dynamic_sizes out.")
    return [] if found is None else [(found, {})]


def _left_out(session: Any, misfits: list[dict[str, list[int]]], count: int) -> list[str]:
    """What is said of batches whose sizes the file does not take."""
    if not misfits:
        return []
    fixed = ", ".join(f"{entry.name}: {list(entry.shape)}" for entry in session.get_inputs())
    return [
        f"{len(misfits)} of {count} batches have sizes that the file does not take ({fixed}), such as {misfits[0]}, and were left out of the check; "
        "dynamic_shapes={argument: {axis: name}} lets an axis vary"
    ]
