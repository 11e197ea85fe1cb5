"""The notes of an export report: how weights are stored, for which processors, and what is not as planned."""

from __future__ import annotations

import warnings

from lightning_cco.errors import CCOWarning
from lightning_cco.export.deployed_forward import Deployed
from lightning_cco.export.engine_patterns import overflow_advice
from lightning_cco.export.engines import FileFeature
from lightning_cco.export.float_islands import unasked_note
from lightning_cco.export.qdq_emitter import Emitter
from lightning_cco.export.report import ExportReport
from lightning_cco.names import list_names
from lightning_cco.quantization.model import HookedModel

REPORT_IT = "Please open an issue with the code of such a layer and the versions of torch and of the engine."


def notes_on_weights(quantized: HookedModel, emitter: Emitter, int4: bool) -> list[str]:
    """Notes on how weights and activations are stored, and for which processors and engines."""
    notes = []
    if emitter.stored.for_matrix_units:
        notes.append(
            f"{len(emitter.stored.for_matrix_units)} convolutions are written for processors with AMX; "
            "for others set deployment_settings.amx: false"
        )
    if emitter.stored.unsigned:
        notes.append("weights are stored as uint8, for processors without VNNI; for others deployment_settings.vnni: true may be faster")
    elif emitter.stored.engine.requires(FileFeature.UNSIGNED_WITHOUT_VNNI):
        notes.append("int8 weights are exact on ARM and on x86 with VNNI; for other processors set deployment_settings.vnni: false")
    elif emitter.stored.overflows_without_vnni:
        notes.append(f"{overflow_advice()} (calibrate again)")
    blocks = emitter.stored.blocks
    few = [name for name, block in blocks.items() if block.bits == 4 and quantized.weights[name][0].num_bits < 4]
    if few:
        notes.append(f"weights in groups of fewer than 4 bits are stored in int4 with a narrower range: {list_names(few)}")
    narrow = [
        name
        for name, quantizers in quantized.weights.items()
        if quantizers[0].num_bits < 8 and name in emitter.ran and (name not in blocks or blocks[name].bits == 8)
    ]
    if narrow and int4:
        notes.append("weights of at most 4 bits are stored in int4; ONNX Runtime computes their layers in float")
    elif narrow:
        notes.append(f"weights of fewer than 8 bits are stored in int8 with a narrower range: {', '.join(narrow)}")
    narrow = _narrow_activations(quantized, emitter)
    if narrow:
        notes.append(f"activations of fewer than 8 bits are narrowed and stored in 8: {', '.join(narrow)}")
    if emitter.stored.engine.not_run:
        notes.append(emitter.stored.engine.not_run)
    return notes


def _narrow_activations(quantized: HookedModel, emitter: Emitter) -> list[str]:
    """Activations of fewer than 8 bits that the file rounds."""
    written = set(emitter.order)
    return [key for key, quantizer in quantized.activations.items() if quantizer.num_bits < 8 and key in written]


def notes_on_bits(quantized: HookedModel, emitter: Emitter) -> list[str]:
    """Notes on formats of fewer than 8 bits in a file that has 8 for all."""
    weights = [name for name, quantizers in quantized.weights.items() if quantizers[0].num_bits < 8 and name in emitter.ran]
    activations = _narrow_activations(quantized, emitter)
    notes = [f"weights of fewer than 8 bits are stored in int8 with a narrower range: {list_names(weights)}"] if weights else []
    return notes + ([f"activations of fewer than 8 bits are narrowed and stored in 8: {list_names(activations)}"] if activations else [])


def notes_on_inputs(deployed: Deployed, types: list[str]) -> list[str]:
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


def notes_on_types(report: ExportReport) -> list[str]:
    """What is said of floats that the file computes in another type than the model."""
    if not report.widened:
        return []
    return [
        f"what the model casts to {' and '.join(report.widened)} is computed in float32, as quantize and dequantize operators take float32: it is more exact"
    ]


def warn_of_floats(report: ExportReport) -> None:
    """Layers that are planned in INT8 and run in float cost what the file is for."""
    layers = list(dict.fromkeys(layer for island in report.float_islands if island.unplanned for layer in island.layers))
    if layers:
        named = ", ".join(f"'{layer}'" for layer in layers[:8]) + (f" and {len(layers) - 8} more" if len(layers) > 8 else "")
        warnings.warn(
            f"export: planned in INT8, but {report.target or 'ONNX Runtime'} computes in float: {named}. The file is right, and slower than planned. "
            f"Skip these layers (skip_quantization: true). {REPORT_IT}",
            CCOWarning,
            stacklevel=3,
        )


def warn_of_uncompared(report: ExportReport) -> None:
    """Rounded tensors of the model that the check has no counterpart for in the file: of these layers it says nothing."""
    if report.uncompared:
        why = "; ".join(list(dict.fromkeys(report.uncompared.values()))[:3])
        warnings.warn(
            f"export: the check could not compare {list_names(list(report.uncompared), 8)} with the file ({why}). The outputs were compared. Make sure that "
            "the example takes the same way through the model's code as in use, and look at the report's SQNR before you use the file.",
            CCOWarning,
            stacklevel=3,
        )


def warn_of_empty_inputs(report: ExportReport) -> None:
    """A file whose input has no values, such as a cache before the first step, takes no others: a size of 0 does not vary."""
    empty = {name: sizes for name, sizes in report.inputs.items() if 0 in sizes}
    if empty:
        taken = ", ".join(f"{name} {sizes}".replace("'", "") for name, sizes in empty.items())
        warnings.warn(
            f"export: the file takes nothing but empty tensors for {list_names(list(empty))} ({taken}), since those of the example are empty. Give an "
            "example with values there, such as a cache of a few steps.",
            CCOWarning,
            stacklevel=3,
        )


def warn_of_integers(report: ExportReport) -> None:
    """A layer that was skipped because rounding hurts it, and is rounded after all."""
    if report.unasked:
        warnings.warn(f"export: {unasked_note(report.unasked)}. {REPORT_IT}", CCOWarning, stacklevel=3)


def warn_of_groups(report: ExportReport) -> None:
    """Weights in groups that become floats in every run cost more time than float ones."""
    if report.as_floats:
        warnings.warn(
            f"export: {report.target or 'ONNX Runtime'} makes floats of the weights in groups of {list_names(report.as_floats)} in every run. The file is "
            "right and small, but these layers are slower than in float. Write weights_group_size: 0 for them. " + REPORT_IT,
            CCOWarning,
            stacklevel=3,
        )


def warn_of_batches(report: ExportReport) -> None:
    """Warn of batches for which a file gives other results than the model, where its batch varies: it would not say so itself."""
    if report.batch_limits:
        said = f"the file is for batches within these limits alone, beyond them its results are not the model's: {'; '.join(report.batch_limits)}"
        report.notes.append(said)
        warnings.warn(f"export: {said}. Give it such batches, or export with dynamic_batch=False.", CCOWarning, stacklevel=4)
