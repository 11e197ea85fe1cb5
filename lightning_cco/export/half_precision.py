"""What stays in float as 16-bit floats: the weights, the scales and the tensors of a file whose engine computes in the types that it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_cco.errors import CCOError
from lightning_cco.export.check_limits import Limits, judge
from lightning_cco.export.comparison import Comparison
from lightning_cco.export.destination import size_of
from lightning_cco.export.errors import ExportError, quoted
from lightning_cco.export.feeds import ForwardArguments, feeds_of, fits
from lightning_cco.export.ort_session import constants, inspected_session, rounded_tensors, session_of
from lightning_cco.export.qdq_emitter import Emitter
from lightning_cco.export.report import ExportReport
from lightning_cco.quantization.model import HookedModel

_LIMITS = Limits(mean_steps=0.25, far_share=0.01, largest_steps=8.0, difference=0.05)
"""A float of 16 bits has 11 of them before the rounding: of 127 steps, sums are off by a tenth of a step, and those of large parts that cancel by more."""
_SMALLEST = float(np.finfo(np.float16).tiny)
_LARGEST = float(np.finfo(np.float16).max)
_AS_INFINITE = 1e30
"""From here on a number in a mask stands for infinity."""


def write_fp16(quantized: HookedModel, path: Path, emitter: Emitter, calls: Sequence[ForwardArguments], report: ExportReport) -> None:
    """Write a file anew with floats of 16 bits; its inputs and outputs keep their types. The conversion is ONNX Runtime's.

    With calls, the tensors of the float32 file are searched for values beyond 16 bits, and the new file is run in ONNX Runtime without fusing operators,
    and compared layer by layer with the fake-quantized model.

    Args:
        quantized: The model, the reference.
        path: The file, which is replaced, also the file with its external data if there is one.
        emitter: What wrote it.
        calls: What to check it on; none: it is not checked.
        report: That of the file before; its size and notes are those of the new one.

    Raises:
        CCOError: A scale, a weight or a tensor is beyond what a float of 16 bits holds, or a layer is wrong; it is named.
    """
    import onnx
    import onnx_ir
    from onnxruntime.transformers.float16 import convert_float_to_float16

    beside = path.with_name(f"{path.name}.data")
    model = onnx.load(str(path))
    shapes = {entry.name for entry in model.graph.value_info}
    _need_room(model)
    halved = convert_float_to_float16(onnx.load(str(path)), keep_io_types=True)
    _need_small_values(model, [entry.name for entry in halved.graph.value_info if _is_half(entry)], path, emitter, calls)
    graph = onnx_ir.from_proto(halved)
    graph.graph.sort()  # what the conversion puts at the end belongs before its readers
    halved = onnx_ir.to_proto(graph)
    kept = [entry for entry in halved.graph.value_info if entry.name in shapes]
    del halved.graph.value_info[:]
    halved.graph.value_info.extend(kept)
    external = beside.exists()
    beside.unlink(missing_ok=True)
    onnx.save(halved, str(path), save_as_external_data=external, location=beside.name if external else None)
    report.size_bytes = size_of(path)
    if calls:
        _check(quantized, path, emitter, calls, report)


def _check(quantized: HookedModel, path: Path, emitter: Emitter, calls: Sequence[ForwardArguments], report: ExportReport) -> None:
    import onnx

    written = onnx.load(str(path))
    rounded = rounded_tensors(written, emitter.order)
    inspected = inspected_session(path, written, [entry.tensor for entries in rounded.values() for entry in entries], as_written=True)
    compared = Comparison(quantized, emitter.model, inspected, rounded, [entry.name for entry in written.graph.output])
    with quantized.evaluating():
        for arguments in calls:
            feeds = feeds_of(inspected, *arguments)
            if fits(inspected, feeds):
                compared.add(compared.run(arguments, feeds))
    halved = ExportReport(report.path)
    compared.tell(halved)
    try:
        judge(halved, limits=_LIMITS)
    except CCOError as error:
        raise ExportError(
            f"{quoted(error)} With fp16=True: a float of 16 bits has 11 of them for its digits, and ends at {_LARGEST:,.0f}."
        ) from error
    report.notes.append(
        f"what is not in INT8 is in floats of 16 bits: SQNR {halved.sqnr_db:.1f} dB from end to end, layer by layer at most {halved.largest_steps:.0f} steps"
    )


def _is_half(entry: Any) -> bool:
    import onnx

    return bool(entry.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16)


def _need_small_values(model: Any, names: Sequence[str], path: Path, emitter: Emitter, calls: Sequence[ForwardArguments]) -> None:
    """Refuse tensors that would become infinite. A processor without operators of 16 bits would not show it: ONNX Runtime computes them with 32 there."""
    import onnx

    makers = {output: node.name for node in model.graph.node for output in node.output}
    tensors = [name for name in names if name in makers]
    if not calls or not tensors:
        return
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors)
    session = session_of(model, path.with_name("watched.onnx"), as_written=True)
    for args, kwargs in calls:
        feeds = feeds_of(session, args, kwargs)
        if not fits(session, feeds):
            continue
        for name, array in zip(tensors, session.run(tensors, feeds), strict=True):
            if (largest := _largest(array)) > _LARGEST:
                raise ExportError(
                    f"fp16=True: '{emitter.layers.get(makers[name], name)}' makes values of {largest:,.0f}, and the largest float of 16 bits is "
                    f"{_LARGEST:,.0f}. Scale what it reads, or leave fp16 out."
                )


def _largest(array: np.ndarray[Any, Any]) -> float:
    """The largest magnitude but for infinities, and what stands for them in masks."""
    magnitudes = np.abs(array)
    return float(magnitudes[magnitudes < _AS_INFINITE].max(initial=0.0))


def _need_room(model: Any) -> None:
    """Refuse scales that would lose their bits, and weights that would become infinite."""
    known = constants(model)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[1] in known:
            _need_scales(node, known)
    for name, array in known.items():
        if array.dtype == np.float32 and _largest(array) > _LARGEST:
            raise ExportError(
                f"fp16=True: the constant '{name}' holds values beyond {_LARGEST:,.0f}, the largest of 16-bit floats. Leave fp16 out."
            )


def _need_scales(node: Any, known: Mapping[str, np.ndarray[Any, Any]]) -> None:
    scales: np.ndarray[Any, Any] = np.atleast_1d(known[node.input[1]])
    used: np.ndarray[Any, Any] = np.ones(scales.shape, bool)
    integers = known.get(node.input[0])
    if integers is not None and scales.size > 1:  # the scale of a channel of zeros says nothing
        axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1)
        used = np.asarray(np.count_nonzero(np.moveaxis(integers, axis, 0).reshape(scales.size, -1), axis=1)) > 0
    beyond = scales[used & ((scales < _SMALLEST) | (scales > _LARGEST))]
    if beyond.size:
        raise ExportError(
            f"fp16=True: '{node.name}' has a scale of {float(beyond[0]):.2g}, which a float of 16 bits holds only between {_SMALLEST:.1g} and "
            f"{_LARGEST:,.0f}. Skip its layer, or leave fp16 out."
        )
