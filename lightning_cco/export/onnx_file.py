"""Writes a quantized model as an ONNX file with quantize and dequantize operators, and checks it in ONNX Runtime."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_cco.errors import CCOError
from lightning_cco.export import passes
from lightning_cco.export.check import call_of, check_file
from lightning_cco.export.constants import arrange_integers
from lightning_cco.export.emit import Emitter
from lightning_cco.export.limits import MEAN_STEPS, judge
from lightning_cco.export.products import split_products
from lightning_cco.export.provenance import layers_of_nodes
from lightning_cco.export.report import ExportReport
from lightning_cco.export.stored import StoredWeights
from lightning_cco.files import real_file, temporary_folder
from lightning_cco.graph.containers import tensors_in
from lightning_cco.quantization.model import QuantizedModel

INT4_OPSET = 21
OPSET = 20
"""From 21 on ONNX Runtime 1.32 refuses its own rewriting of symmetric int8 pairs (output_dtype does not match y_zero_point)."""


def export_onnx(
    quantized: QuantizedModel,
    path: str | Path,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    batches: Iterable[Any] = (),
    dynamic_batch: bool = True,
    check: bool = True,
    min_sqnr_db: float | None = None,
    max_mean_steps: float = MEAN_STEPS,
    int4: bool = False,
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
        **options: Further arguments of `torch.onnx.export`, such as ``dynamic_shapes``.

    Raises:
        CCOError: A package is missing, the model was never calibrated, it can't be exported, the path can't be written, or the check fails; then no
            file is left.
    """
    _need_packages()
    if not quantized.calibrated:
        raise CCOError(
            "export: the model was never calibrated, so its activations have no ranges. Run fit, or call calibrate(batches) first."
        )
    args, kwargs = tuple(example_args), dict(example_kwargs or {})
    if not args and not kwargs:
        raise CCOError("export: an example is needed to trace the forward. Pass example_args=(tensor, ...) or example_kwargs={...}.")
    if int4 and quantized.settings.deployment_settings.target_framework == "tensorrt":
        raise CCOError("export: int4=True with target_framework: tensorrt, which takes 4-bit weights in blocks only. Leave int4 out.")
    target = export_target(path, ".onnx")
    try:
        with temporary_folder(target.parent) as folder:
            temporary = folder / target.name
            emitter = _write(quantized, temporary, args, kwargs, dynamic_batch, int4, options)
            size = sum(part.stat().st_size for part in folder.iterdir())
            report = ExportReport(str(path), size, _float_size(quantized), notes=_notes(quantized, emitter, int4))
            if check:
                check_file(quantized, temporary, emitter, [call_of(batch) for batch in batches] or [(args, kwargs)], report)
                judge(report, min_sqnr_db, max_mean_steps)
            _move(temporary, target)
    except OSError as error:
        raise CCOError(f"export: '{path}' can't be written: {error}. Give a path in a folder that can be.") from error
    return report


def export_target(path: str | Path, ending: str) -> Path:
    """The file that an export is to write, through symbolic links.

    Args:
        path: What the user gave.
        ending: What it must end in.

    Raises:
        CCOError: It ends in something else, or what is there is no file.
    """
    if Path(path).suffix.lower() != ending:
        raise CCOError(
            f"export: a path that ends in .onnx (a file for ONNX Runtime, OpenVINO and TensorRT, which build theirs from it) or in .pt2 "
            f"(a torch.export program) was expected, '{path}' came. Write '{Path(path).with_suffix(ending) if Path(path).name else 'model' + ending}'."
        )
    try:
        return real_file(path)
    except OSError as error:
        raise CCOError(f"export: '{path}' can't be written: {error}. Give the path of a file in a folder that can be.") from error


def _move(made: Path, target: Path) -> None:
    """Put a file, and the one beside it that holds its large tensors, in the place of older ones, so that no two of them are ever mixed."""
    data, old = made.with_name(f"{made.name}.data"), target.with_name(f"{target.name}.data")
    if data.exists() or old.exists():
        target.unlink(missing_ok=True)
        old.unlink(missing_ok=True)
    if data.exists():
        os.replace(data, old)
    os.replace(made, target)


def _need_packages() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise CCOError(f"export: {', '.join(missing)} not installed. Write: pip install 'lightning-cco[export]'.")


def _write(
    quantized: QuantizedModel,
    path: Path,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_batch: bool,
    int4: bool,
    options: dict[str, Any],
) -> Emitter:
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    opset = INT4_OPSET if int4 else OPSET
    stored = StoredWeights(quantized, int4)
    emitter = Emitter(quantized, stored, opset)
    model = quantized.model
    if dynamic_batch and "dynamic_shapes" not in options:
        args, kwargs = two_samples(args), two_samples(kwargs)
        options["dynamic_shapes"] = batch_shapes(model, args, kwargs)
    with quantized.evaluating(), _quietly(), torch.compiler.set_stance("force_eager"):
        with emitter.collecting():
            outputs = [".".join(map(str, slot)) for slot, _ in tensors_in(model(*args, **kwargs))]
        try:
            with emitter.emitting():
                # By itself the ONNX exporter tries other ways of tracing when this one fails, which would lose the quantization.
                traced = torch.export.export(model, args, kwargs, dynamic_shapes=options.pop("dynamic_shapes", None), strict=False)
        except Exception as error:
            raise CCOError(_untraceable(quantized, emitter.reached, error)) from error
        try:
            program = torch.onnx.export(traced, dynamo=True, opset_version=opset, verbose=False, **options)
        except Exception as error:
            raise CCOError(_inexpressible(model, error)) from error
    assert program is not None
    graph = program.model.graph
    passes.fix_shapes(graph)
    arrange_integers(graph)
    if stored.target.integer_indexing:
        passes.index_integers(graph)
    if stored.target.split_products:
        split_products(graph)
    if stored.target.own_zero_points:
        passes.own_zero_points(graph)
    if int4:
        passes.pack_int4(graph)
    RemoveUnusedNodesPass()(program.model)  # what the passes before put something else in place of
    passes.name_nodes(graph)
    emitter.layers = layers_of_nodes(graph, program.exported_program)
    emitter.modules = passes.take_modules(graph)
    emitter.reads_shapes = any(node.op_type == "Shape" for node in graph)
    passes.name_outputs(graph, outputs)
    program.model.metadata_props.update(
        {
            "lightning_cco.version": _version(),
            "lightning_cco.quantized_layers": json.dumps(sorted(quantized.plan.quantized)),
            "lightning_cco.skipped_layers": json.dumps(quantized.plan.skipped),
            "lightning_cco.recipe": json.dumps(quantized.settings.to_dict()),
        }
    )
    program.save(str(path))
    return emitter


def _untraceable(quantized: QuantizedModel, reached: str, error: Exception) -> str:
    where = f" behind layer '{reached}' (module '{quantized.graph[reached].path}')" if reached else ""
    return (
        f"export: {type(quantized.model).__name__} can't be traced by torch.export{where}: {type(error).__name__}: {_first_paragraph(error)}. "
        "Control flow that depends on values can't be in a file: write it with torch.where or torch.cond. If a part of the model is not needed in "
        "deployment, export the submodule that is; if the batch size is fixed in the code, pass dynamic_batch=False."
    )


def _inexpressible(model: torch.nn.Module, error: Exception) -> str:
    operators = re.findall(r"OpOverload\(op='([^']+)'", str(error)) or re.findall(r"No ONNX function found for (\S+)", str(error))
    what = f"it uses {', '.join(dict.fromkeys(operators))}, which ONNX has no operator for" if operators else _first_paragraph(error)
    return (
        f"export: {type(model).__name__} can't be converted to ONNX: {what}. Replace it by operations that ONNX has, pass custom_translation_table as in "
        "torch.onnx.export, or export a .pt2 file, which can hold any operation."
    )


def _first_paragraph(error: Exception) -> str:
    return " ".join(str(error).strip().split("\n\n")[0].split())[:400].rstrip(".")


def two_samples(value: Any) -> Any:
    """Double batches of one sample: torch.export takes a size of 1 for a constant."""
    if isinstance(value, Tensor):
        return torch.cat([value, value]) if value.dim() and value.shape[0] == 1 else value
    if isinstance(value, (tuple, list)):
        return type(value)(two_samples(item) for item in value)
    return {key: two_samples(item) for key, item in value.items()} if isinstance(value, dict) else value


def batch_shapes(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first axis of every tensor varies, together; in the form that `torch.export` wants: what ``*args`` takes is one entry."""
    batch = torch.export.Dim.DYNAMIC

    def shape(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {0: batch} if value.dim() else None
        if isinstance(value, (tuple, list)):
            return type(value)(shape(item) for item in value)
        return {key: shape(item) for key, item in value.items()} if isinstance(value, dict) else None

    given = [shape(value) for value in args]
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        before = kinds.index(inspect.Parameter.VAR_POSITIONAL)
        given = [*given[:before], tuple(given[before:])]
    return tuple(given) if args and not kwargs else [*given, *map(shape, kwargs.values())]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the exporter's own remarks from the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch._export", "torch.fx", "onnxscript", "onnx_ir")]
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


def _float_size(quantized: QuantizedModel) -> int:
    """Bytes of the parameters and floating-point buffers, each tensor once."""
    tensors = {id(t): t for _, t in [*quantized.model.named_parameters(), *quantized.model.named_buffers()] if t.is_floating_point()}
    return sum(4 * tensor.numel() for tensor in tensors.values())


def _notes(quantized: QuantizedModel, emitter: Emitter, int4: bool) -> list[str]:
    notes = []
    if emitter.stored.for_matrix_units:
        notes.append(
            f"{len(emitter.stored.for_matrix_units)} convolutions are written for processors with AMX; "
            "for others set deployment_settings.amx: false"
        )
    if emitter.stored.unsigned:
        notes.append("weights are stored as uint8, for processors without VNNI; for others deployment_settings.vnni: true may be faster")
    elif emitter.stored.target.unsigned_without_vnni:
        notes.append("int8 weights are exact on ARM and on x86 with VNNI; for other processors set deployment_settings.vnni: false")
    narrow = [name for name, quantizers in quantized.weights.items() if quantizers[0].num_bits < 8]
    if narrow and int4:
        notes.append("weights of at most 4 bits are stored in int4; ONNX Runtime computes their layers in float")
    elif narrow:
        notes.append(f"weights of fewer than 8 bits are stored in int8 with a narrower range: {', '.join(narrow)}")
    narrow = [key for key, quantizer in quantized.activations.items() if quantizer.num_bits < 8]
    if narrow:
        notes.append(f"activations of fewer than 8 bits are clamped and stored in 8: {', '.join(narrow)}")
    target = quantized.settings.deployment_settings.target_framework
    if target == "openvino" and emitter.reads_shapes and any(quantized.graph[layer].kind == "conv" for layer in emitter.stored.biases):
        notes.append(
            "the size of the batch is computed with, and OpenVINO 2026.4 can then leave out a convolution's bias: "
            "fix it with model.reshape(...) before compiling, or export with dynamic_batch=False"
        )
    if target == "tensorrt":
        notes.append("the file is what TensorRT's documentation asks for (symmetric int8 Q/DQ pairs); it was run in ONNX Runtime only")
    return notes


def _version() -> str:
    from lightning_cco import __version__

    return __version__
