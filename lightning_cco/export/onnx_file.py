"""Writes a quantized model as an ONNX file with quantize and dequantize operators, and checks it in ONNX Runtime."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_cco.compat.onnx_exporter import LOGGERS
from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.export import onnx_passes
from lightning_cco.export.axes import Axes, check_axis_names, name_axes, ways_to_vary
from lightning_cco.export.check import Call, call_of, check_file
from lightning_cco.export.constants import arrange_integers
from lightning_cco.export.destination import export_target, move
from lightning_cco.export.engine_patterns import adds_products_exactly
from lightning_cco.export.engines import ENGINES, Form
from lightning_cco.export.failures import failed, inexpressible, need_packages, need_writable_names, untraceable
from lightning_cco.export.limits import MEAN_STEPS, judge
from lightning_cco.export.network import Network
from lightning_cco.export.options import checked_options
from lightning_cco.export.precision import in_float32, other_types
from lightning_cco.export.products import fill_biases, split_products, store_transposed
from lightning_cco.export.provenance import layers_of_nodes
from lightning_cco.export.qdq_emitter import Emitter
from lightning_cco.export.report import ExportReport
from lightning_cco.export.signature import Deployed
from lightning_cco.export.sizes import Sizes, SizesDoNotVary, fixed_since, limits_of, short_reason, sizes_to_vary
from lightning_cco.export.stored import StoredWeights
from lightning_cco.export.weight_blocks import share_packed
from lightning_cco.files import temporary_folder
from lightning_cco.graph.compiled import eager
from lightning_cco.names import list_names
from lightning_cco.quantization.model import HookedModel
from lightning_cco.quantization.targets import TARGETS
from lightning_cco.version import __version__

INT4_OPSET = 21
OPSET = ENGINES["ort"].amount(Form.OPSET, INT4_OPSET)
"""Whatever the target: each file is run in ONNX Runtime."""


def export_onnx(
    quantized: HookedModel,
    path: str | Path,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    batches: Iterable[Any] = (),
    dynamic_batch: bool = True,
    check: bool = True,
    min_sqnr_db: float | None = None,
    max_mean_steps: float = MEAN_STEPS,
    int4: bool = False,
    network: Network | None = None,
    dynamic_sizes: bool | None = None,
    **options: Any,
) -> ExportReport:
    """Write an INT8 ONNX file and compare it with the fake-quantized model.

    Weights are stored as int8 with their scales, biases as int32, batch norms are folded, activations carry QuantizeLinear and DequantizeLinear where the
    plan has them and nowhere else. The plan and the package's version are in the file's metadata. The file appears under its name only once it is whole.

    Args:
        quantized: The calibrated model.
        path: Where to write.
        example_args: Positional arguments of one forward.
        example_kwargs: Keyword arguments of it.
        batches: What the file is checked on, as in `QuantizedModel.calibrate`; by default the example.
        dynamic_batch: Let the first axis of every input vary.
        check: Run the file in ONNX Runtime and compare.
        min_sqnr_db: The check fails below this signal-to-noise ratio of the outputs from end to end; `None`: the layers decide by themselves.
        max_mean_steps: The check fails if a quantized tensor is further off than this on average, in steps of its scale, computed from what the engine
            computed before it.
        int4: Store weights of at most 4 bits in 4 bits (opset 21): half the size, but ONNX Runtime then computes those layers in float.
        network: What the file holds in the place of the model's ``forward``, whose arguments the example then is: `network_of_the_step`.
        dynamic_sizes: Let the length of sequences, and height and width of images vary, where the model allows it. `None`: where it costs nothing. Fixed
            sizes let a first convolution of stride 2 read blocks of pixels.
        **options: Further arguments of `torch.onnx.export`, such as ``dynamic_shapes``.

    Raises:
        CCOError: A package is missing, the model was never calibrated, it can't be exported, the path can't be written, or the check fails; then no
            file is left.
    """
    need_packages()
    grouped = any(quantizers[0].group is not None for quantizers in quantized.weights.values())
    taken = checked_options(
        options, int4 or grouped, TARGETS[quantized.settings.deployment_settings.target_framework].symmetric_activations
    )
    if not quantized.calibrated:
        raise CCOError(
            "export: the model was never calibrated, so its activations have no ranges. Run fit, or call calibrate(batches) first."
        )
    args, kwargs = tuple(example_args), dict(example_kwargs or {})
    if not args and not kwargs:
        raise CCOError("export: an example is needed to trace the forward. Pass example_args=(tensor, ...) or example_kwargs={...}.")
    engine = TARGETS[quantized.settings.deployment_settings.target_framework]
    if int4 and engine.refuses_int4:
        raise CCOError(f"export: int4=True with target_framework: {engine.name}, which {engine.refuses_int4}. Leave int4 out.")
    need_writable_names(name for layer in quantized.graph for name in (layer.path, *layer.parameters))
    target = export_target(path, ".onnx")
    types = other_types(quantized.model)
    float_size = _float_size(quantized)
    with in_float32(quantized.model), quantized.evaluating():
        deployed = Deployed(quantized.model, args, kwargs, cast=bool(types), network=network)
        calls = [deployed.tensors(*call_of(batch)) for batch in batches] if check else []
        notes = _not_checked_on(calls, deployed)
        fitting: list[Call] = [(tensors, {}) for tensors in calls if tensors is not None] or [(deployed.example, {})]
        vary, why_fixed = sizes_to_vary(quantized, deployed, dynamic_batch and not _says_axes(taken), dynamic_sizes, check)
        try:
            with temporary_folder(target.parent) as folder:
                temporary = folder / target.name
                for sizes in [vary, {}] if vary else [vary]:
                    report = ExportReport(str(path), float_size_bytes=float_size)
                    try:
                        emitter, said = _write(
                            quantized, deployed, temporary, dynamic_batch, int4, taken, sizes, bool(dynamic_sizes), report
                        )
                        report.size_bytes = sum(part.stat().st_size for part in folder.iterdir())
                        report.notes += _notes(quantized, emitter, int4) + _said(deployed, types) + said + notes
                        if check:
                            check_file(quantized, temporary, emitter, fitting, report, bool(sizes))
                            judge(report, min_sqnr_db, max_mean_steps)
                        break
                    except CCOError as error:
                        if not sizes or dynamic_sizes:
                            raise
                        for part in folder.iterdir():
                            part.unlink()
                        why_fixed = fixed_since(short_reason(error))
                if why_fixed:
                    report.notes.append(why_fixed)
                _warn_of_floats(report)
                _warn_of_groups(report)
                move(temporary, target)
        except OSError as error:
            raise CCOError(f"export: '{path}' can't be written: {error}. Give a path in a folder that can be.") from error
    return report


def _says_axes(options: Mapping[str, Any]) -> bool:
    return options.get("dynamic_shapes") is not None or options.get("dynamic_axes") is not None


def _not_checked_on(calls: Sequence[tuple[Tensor, ...] | None], deployed: Deployed) -> list[str]:
    """What is said of batches that are not what the file takes.

    Raises:
        CCOError: None of them is.
    """
    others = sum(call is None for call in calls)
    if not others:
        return []
    takes = ", ".join(f"{name}: {list(tensor.shape)}" for name, tensor in zip(deployed.names, deployed.example, strict=False))
    if others == len(calls):
        raise CCOError(
            f"export: batches: none of the {others} is what the file takes ({takes}). Expected the arguments of one forward in each, such as "
            "batches=[(x,), (x,)], with the example's keys and constants."
        )
    return [f"{others} of {len(calls)} batches are of another form than the example ({takes}) and were left out of the check"]


def _warn_of_floats(report: ExportReport) -> None:
    """Products that are planned in INT8 and run in float cost what the file is for."""
    layers = list(dict.fromkeys(layer for island in report.float_islands if island.unplanned for layer in island.layers))
    if layers:
        named = ", ".join(f"'{layer}'" for layer in layers[:8]) + (f" and {len(layers) - 8} more" if len(layers) > 8 else "")
        warnings.warn(
            f"export: planned in INT8, but {report.target or 'ONNX Runtime'} computes in float: {named}. The file is right, and slower than planned. "
            "Skip these layers, or report this form of the model.",
            CCOWarning,
            stacklevel=3,
        )


def _warn_of_groups(report: ExportReport) -> None:
    """Weights in groups that become floats in every run cost more time than float ones."""
    if report.as_floats:
        warnings.warn(
            f"export: {report.target or 'ONNX Runtime'} makes floats of the weights in groups of {list_names(report.as_floats)} in every run. The file is "
            "right and small, but these layers are slower than in float. Write weights_group_size: 0 for them, or report this form of the model.",
            CCOWarning,
            stacklevel=3,
        )


def _said(deployed: Deployed, types: list[str]) -> list[str]:
    """Notes on what the file takes and gives."""
    notes = []
    if types:
        notes.append(f"the model's {', '.join(types)} was exported as float32; so are the file's inputs")
    if deployed.dropped:
        notes.append(f"labels and what is computed from them are not in the file: {', '.join(deployed.dropped)}")
    if deployed.lost:
        notes.append(f"outputs that are not in the file: {', '.join(deployed.lost)}")
    if deployed.fixed:
        notes.append(f"arguments fixed in the file as in the example: {', '.join(deployed.fixed)}")
    return notes


def _write(
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

    grouped = any(quantizers[0].group is not None for quantizers in quantized.weights.values())
    opset = options.get("opset_version", INT4_OPSET if int4 or grouped else OPSET)
    inputs, outputs = list(options.get("input_names", [])), list(options.get("output_names", []))
    for given, names, what in ((inputs, deployed.names, "input"), (outputs, deployed.outputs, "output")):
        if len(given) > len(names):
            raise CCOError(f"export: {what}_names has {len(given)} names, but the file has {len(names)} {what}s: {names}.")
    inputs += deployed.names[len(inputs) :]
    outputs += deployed.outputs[len(outputs) :]
    if options.get("dynamic_axes") is not None:
        check_axis_names(options["dynamic_axes"], inputs + deployed.names, outputs + deployed.outputs)
    stored = StoredWeights(quantized, int4)
    emitter = Emitter(quantized, stored, opset)
    emitter.model = deployed
    with _quietly(), eager():
        traced, axes = _traced(
            deployed, emitter, ways_to_vary(deployed, dynamic_batch, options, inputs, sizes), bool(sizes) and not at_any_price
        )
        conversion = {name: options[name] for name in ("verbose", "optimize", "custom_translation_table") if name in options}
        try:
            program = torch.onnx.export(traced, dynamo=True, opset_version=opset, **{"verbose": False, **conversion})
        except Exception as error:
            raise CCOError(inexpressible(quantized.model, error)) from error
    assert program is not None
    graph = program.model.graph
    written = graph.opset_imports.get("", opset)
    if written != opset:  # the exporter leaves the opset that it works in where its converter fails
        raise CCOError(
            f"export: opset_version={opset} can't be written for this model: its operators need opset {written}. Leave opset_version out."
        )
    try:
        onnx_passes.fix_shapes(graph)
        arrange_integers(graph)
        if stored.engine.wanted(Form.INTEGER_INDEXING):
            onnx_passes.index_integers(graph)
        if stored.engine.wanted(Form.SPLIT_PRODUCTS):
            split_products(graph)
        if stored.engine.wanted(Form.FULL_BIASES):
            fill_biases(graph)
        if stored.engine.wanted(Form.STORED_TRANSPOSED):
            store_transposed(graph)
        onnx_passes.share_constants(graph)
        if stored.engine.wanted(Form.OWN_ZERO_POINTS):
            onnx_passes.own_zero_points(graph)
        if int4 or grouped:
            onnx_passes.pack_int4(graph, blocks_alone=not int4)
        share_packed(graph)
        RemoveUnusedNodesPass()(program.model)  # what the passes before put something else in place of
        onnx_passes.name_nodes(graph)
        emitter.layers = layers_of_nodes(graph, program.exported_program)
        emitter.modules = onnx_passes.take_modules(graph)
        emitter.reads_shapes = any(node.op_type == "Shape" for node in graph)
        onnx_passes.name_parameters(graph)
        onnx_passes.name_inputs(graph, inputs)
        onnx_passes.name_outputs(graph, outputs)
        fixed = name_axes(graph, axes)
    except Exception as error:
        raise CCOError(failed("rewriting the exporter's graph", error)) from error
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
    report.inputs = {value.name: [getattr(size, "value", size) for size in value.shape or ()] for value in graph.inputs}
    said = [f"fixed, since the model ties them to fixed sizes: {'; '.join(fixed)}"] if fixed else []
    limits = limits_of(traced, inputs) if sizes else []
    return emitter, said + ([f"sizes within which the file holds: {'; '.join(limits)}"] if limits else [])


def _traced(deployed: Deployed, emitter: Emitter, ways: Iterator[Axes], free: bool) -> tuple[torch.export.ExportedProgram, Axes]:
    """The first way of tracing that works; ``free``: only if it costs nothing that sizes vary."""
    failure: Exception | None = None
    for axes in ways:
        with emitter.collecting():
            deployed(*axes.tensors)
        if free and emitter.stored.blocked:
            raise SizesDoNotVary("the first convolution then reads blocks of 2 x 2 pixels, which is faster")
        try:
            with emitter.emitting():
                # By itself the ONNX exporter tries other ways of tracing when this one fails, which would lose the quantization.
                return torch.export.export(deployed, axes.tensors, dynamic_shapes=(tuple(axes.specifications),), strict=False), axes
        except Exception as error:
            failure = failure or error
    assert failure is not None
    reached, quantized = emitter.reached, emitter.quantized
    where = f" behind layer '{reached}' (module '{quantized.graph[reached].path}')" if reached else ""
    raise CCOError(untraceable(quantized.model, where, failure)) from failure


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


def _float_size(quantized: HookedModel) -> int:
    """Bytes of the parameters and floating-point buffers, each tensor once."""
    tensors = {id(t): t for _, t in [*quantized.model.named_parameters(), *quantized.model.named_buffers()] if t.is_floating_point()}
    return sum(4 * tensor.numel() for tensor in tensors.values())


def _notes(quantized: HookedModel, emitter: Emitter, int4: bool) -> list[str]:
    notes = []
    if emitter.stored.for_matrix_units:
        notes.append(
            f"{len(emitter.stored.for_matrix_units)} convolutions are written for processors with AMX; "
            "for others set deployment_settings.amx: false"
        )
    if emitter.stored.unsigned:
        notes.append("weights are stored as uint8, for processors without VNNI; for others deployment_settings.vnni: true may be faster")
    elif emitter.stored.engine.wanted(Form.UNSIGNED_WITHOUT_VNNI):
        notes.append("int8 weights are exact on ARM and on x86 with VNNI; for other processors set deployment_settings.vnni: false")
    elif emitter.stored.overflows_without_vnni:
        here = "" if adds_products_exactly() else ", so on this one"
        notes.append(
            f"on x86 processors without VNNI{here} OpenVINO's sums of 8-bit products overflow: for them set deployment_settings.vnni: false, "
            "which gives weights 7 bits (calibrate again)"
        )
    blocks = emitter.stored.blocks
    few = [name for name, block in blocks.items() if block.bits == 4 and quantized.weights[name][0].num_bits < 4]
    if few:
        notes.append(f"weights in groups of fewer than 4 bits are stored in int4 with a narrower range: {list_names(few)}")
    narrow = [
        name
        for name, quantizers in quantized.weights.items()
        if quantizers[0].num_bits < 8 and (name not in blocks or blocks[name].bits == 8)
    ]
    if narrow and int4:
        notes.append("weights of at most 4 bits are stored in int4; ONNX Runtime computes their layers in float")
    elif narrow:
        notes.append(f"weights of fewer than 8 bits are stored in int8 with a narrower range: {', '.join(narrow)}")
    narrow = [key for key, quantizer in quantized.activations.items() if quantizer.num_bits < 8]
    if narrow:
        notes.append(f"activations of fewer than 8 bits are narrowed and stored in 8: {', '.join(narrow)}")
    engine = emitter.stored.engine
    if engine.dynamic_batch and emitter.reads_shapes and any(quantized.graph[layer].kind == "conv" for layer in emitter.stored.biases):
        notes.append(
            f"the size of the batch is computed with, and {engine.dynamic_batch}: "
            "fix it with model.reshape(...) before compiling, or export with dynamic_batch=False"
        )
    if engine.not_run:
        notes.append(engine.not_run)
    return notes
