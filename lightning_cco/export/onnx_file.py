"""Writes a quantized model as an ONNX file with quantize and dequantize operators, and checks it in ONNX Runtime."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.export.check import check_file
from lightning_cco.export.check_limits import MEAN_STEPS, Limits, judge
from lightning_cco.export.deployed_forward import Deployed, deployed_forward
from lightning_cco.export.destination import export_target, move, size_of
from lightning_cco.export.dynamic_sizes import ExportAttempts, Sizes, sizes_to_vary
from lightning_cco.export.engines import ENGINES
from lightning_cco.export.errors import ExportError
from lightning_cco.export.failures import need_engine, need_onnx_forms, need_packages, need_writable_names
from lightning_cco.export.feeds import ForwardArguments, call_of
from lightning_cco.export.fixed_batch import of_one_sample, refuse_varying
from lightning_cco.export.half_precision import write_fp16
from lightning_cco.export.node_times import Written
from lightning_cco.export.onnx_notes import (
    notes_on_inputs,
    notes_on_types,
    notes_on_weights,
    warn_of_batches,
    warn_of_empty_inputs,
    warn_of_floats,
    warn_of_groups,
    warn_of_integers,
    warn_of_uncompared,
)
from lightning_cco.export.onnx_writer import write_onnx
from lightning_cco.export.options import checked_options
from lightning_cco.export.precision import float_bytes, in_float32
from lightning_cco.export.report import ExportReport
from lightning_cco.export.step_network import StepNetwork
from lightning_cco.files import temporary_folder
from lightning_cco.graph.compiled import eager
from lightning_cco.quantization.model import HookedModel
from lightning_cco.quantization.plan import packs_weights
from lightning_cco.quantization.targets import TARGETS


def export_onnx(
    quantized: HookedModel,
    path: str | Path,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    batches: Iterable[Any] = (),
    dynamic_batch: bool | None = None,
    check: bool = True,
    min_sqnr_db: float | None = None,
    max_mean_steps: float = MEAN_STEPS,
    int4: bool | None = None,
    network: StepNetwork | None = None,
    dynamic_sizes: bool | None = None,
    written: Written | None = None,
    fp16: bool | None = None,
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
        batches: Batches to check the file on, as in `QuantizedModel.calibrate`; by default the example.
        dynamic_batch: Make the first axis of every input dynamic. `None`: if the model allows it; else the report and a warning say so. For engines that
            need fixed sizes (QNN), `None` gives a file for one sample, and `False` one for the batch size of the example.
        check: Run the file in ONNX Runtime and compare.
        min_sqnr_db: The check fails below this SQNR of the outputs from end to end; `None`: only the comparison layer by layer counts.
        max_mean_steps: The check fails if a quantized tensor is further off than this on average, in steps of its scale, computed from what the engine
            computed before it.
        int4: Store weights of at most 4 bits in 4 bits (opset 21): half the size, but ONNX Runtime then computes those layers in float. `None`: as the
            recipe says, in `deployment_settings` or by its budget.
        network: The part of a training step to export instead of the model's ``forward``; the example is then for it (`network_of_the_step`).
        dynamic_sizes: Make the sequence length, and height and width of images dynamic, if the model allows it. `None`: unless fixed sizes are faster (a
            first convolution of stride 2 that reads blocks of pixels).
        written: Filled with the parts that the file was written from.
        fp16: Use 16-bit floats for the layers that are not in INT8, after the file with 32-bit floats was checked; for TensorRT, which computes in the types
            of the file. `None`: as in `deployment_settings`.
        **options: Further arguments of `torch.onnx.export`, such as ``dynamic_shapes``.

    Raises:
        CCOError: A package is missing, the model was never calibrated, it can't be exported, the path can't be written, or the check fails; then no
            file is left.
    """
    int4 = packs_weights(quantized.settings) if int4 is None else int4
    fp16 = quantized.settings.deployment_settings.fp16 if fp16 is None else fp16
    taken = _checked(quantized, check, int4, fp16, options)
    engine = ENGINES[quantized.settings.deployment_settings.target_framework]
    asked = {name: taken.get(name) for name in ("dynamic_shapes", "dynamic_axes")}
    refuse_varying(engine, {"dynamic_batch": dynamic_batch, "dynamic_sizes": dynamic_sizes, **asked})
    args, kwargs = tuple(example_args), dict(example_kwargs or {})
    if not args and not kwargs:
        raise ExportError("an example is needed to trace the forward. Pass example_args=(tensor, ...) or example_kwargs={...}.")
    need_writable_names(name for layer in quantized.graph for name in (layer.path, *layer.parameters))
    if "custom_translation_table" not in taken:
        need_onnx_forms(quantized.model, quantized.graph)
    target = export_target(path, ".onnx")
    float_size = float_bytes(quantized.model)
    with in_float32(quantized.model) as types, quantized.evaluating(), eager():

        def forward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Deployed:
            return deployed_forward(quantized, args, kwargs, types, network)

        deployed = forward(args, kwargs)
        calls = [deployed.tensors(*call_of(batch)) for batch in batches] if check else []
        notes = _not_checked_on(calls, deployed)
        taking = [tensors for tensors in calls if tensors is not None]
        if engine.fixed_batch and dynamic_batch is None:
            dynamic_batch = False
            deployed, taking, said_of_batch = of_one_sample(deployed, taking or [deployed.example], engine.fixed_batch, forward)
            notes += said_of_batch
        fitting: list[ForwardArguments] = [(tensors, {}) for tensors in taking] or [(deployed.example, {})]
        says_axes = _says_axes(taken)
        vary, why_fixed = sizes_to_vary(quantized, deployed, dynamic_batch is not False and not says_axes, dynamic_sizes, check)
        ways = ExportAttempts(vary, True if says_axes else dynamic_batch, bool(dynamic_sizes), deployed.example, why_fixed)

        def write(temporary: Path, sizes: Sizes, varies: bool) -> ExportReport:
            report = ExportReport(str(path), float_size_bytes=float_size)
            emitter, said = write_onnx(quantized, deployed, temporary, varies, int4, taken, sizes, bool(dynamic_sizes), report)
            if written is not None:
                written.layers, written.example = dict(emitter.layers), [t.detach().cpu().numpy() for t in deployed.example]
            report.size_bytes = size_of(temporary)
            report.notes += notes_on_weights(quantized, emitter, int4) + notes_on_inputs(deployed, types) + said + notes
            report.notes += notes_on_types(report)
            if check:
                check_file(quantized, temporary, emitter, fitting, report, bool(sizes))
                judge(report, min_sqnr_db, Limits(max_mean_steps))
            if fp16:
                write_fp16(quantized, temporary, emitter, fitting if check else (), report)
            return report

        try:
            with temporary_folder(target.parent) as folder:
                report = _by_the_best(ways, folder, lambda sizes, varies: write(folder / target.name, sizes, varies))
                warn_of_floats(report)
                warn_of_integers(report)
                warn_of_uncompared(report)
                warn_of_empty_inputs(report)
                warn_of_groups(report)
                warn_of_batches(report)
                move(folder / target.name, target)
        except OSError as error:
            raise ExportError(f"'{path}' can't be written: {error}. Give a path in a folder that can be.") from error
    return report


def _by_the_best(ways: ExportAttempts, folder: Path, write: Callable[[Sizes, bool], ExportReport]) -> ExportReport:
    """Write a file in the first way that works; the report says what is fixed in it.

    Raises:
        CCOError: None does.
    """
    while True:
        try:
            report = write(*ways.next())
            break
        except CCOError as error:
            ways.failed(error)
            for part in folder.iterdir():
                part.unlink()
    if ways.why:
        report.notes.append(ways.why)
    if ways.unvarying is not None:
        warnings.warn(f"export: {ways.why}.", CCOWarning, stacklevel=4)
    return report


def _checked(quantized: HookedModel, check: bool, int4: bool, fp16: bool, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the exporter that are acted on, once it is known that a file can be written.

    Raises:
        CCOError: It can't: a package, the calibration, or something of the engine is missing.
    """
    need_packages()
    target = TARGETS[quantized.settings.deployment_settings.target_framework]
    reader = ENGINES[target.name]
    if check and reader.strict:
        need_engine(reader)
    grouped = any(quantizers[0].in_rows for quantizers in quantized.weights.values())
    taken = checked_options(options, int4 or grouped, target.symmetric_activations)
    if not quantized.calibrated:
        raise ExportError("the model was never calibrated, so its activations have no ranges. Run fit, or call calibrate(batches) first.")
    if int4 and target.refuses_int4:
        raise ExportError(f"int4=True with target_framework: {target.name}, which {target.refuses_int4}. Leave int4 out.")
    if fp16 and not reader.takes_fp16:
        raise ExportError(
            f"fp16=True with target_framework: {target.name}, which decides itself in which float type it computes. Leave fp16 out, or choose "
            "target_framework: tensorrt."
        )
    return taken


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
        raise ExportError(
            f"batches: none of the {others} is what the file takes ({takes}). Expected the arguments of one forward in each, such as "
            "batches=[(x,), (x,)], with the example's keys and constants."
        )
    return [f"{others} of {len(calls)} batches: of another structure than the example ({takes}), left out of the check"]
