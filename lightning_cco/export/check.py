"""Runs an exported file in ONNX Runtime and compares it with the fake-quantized model, tensor by tensor."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lightning_cco.export.emit import Emitter
from lightning_cco.export.report import ExportReport, LayerDifference
from lightning_cco.graph.frames import tensors_in
from lightning_cco.quantization.model import QuantizedModel
from lightning_cco.quantization.quantizer import ActivationQuantizer

_CONVERSIONS = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
_INTEGER = ("QLinear", "QGemm", "QAttention", "ConvInteger", "MatMulInteger", "QEmbed", "QOrdered")
_HEAVY = {"Conv", "ConvTranspose", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Add", "Mul", "Concat", "LSTM", "GRU", "RNN", "Attention",
          "MultiHeadAttention", "GlobalAveragePool", "AveragePool", "NhwcFusedConv"}  # fmt: skip


def check_file(
    quantized: QuantizedModel, path: Path, emitter: Emitter, args: tuple[Any, ...], kwargs: dict[str, Any], report: ExportReport
) -> None:
    """Fill a report with what a run of the file shows.

    Args:
        quantized: The model, the reference.
        path: The file.
        emitter: What wrote it.
        args: Positional arguments to run both with.
        kwargs: Keyword arguments.
        report: Filled in place.
    """
    reference: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor | ActivationQuantizer, _: Tensor) -> None:
        assert isinstance(output, Tensor)
        reference.setdefault(name, output.detach().clone())

    with quantized.evaluating(), quantized.runtime.doing("record_quantized", keep):
        outputs = [tensor.detach().cpu().double().numpy() for _, tensor in tensors_in(quantized.model(*args, **kwargs))]
    feeds = [tensor.detach().cpu().numpy() for _, tensor in tensors_in([args, kwargs])]
    results, optimized = _run(path, feeds)
    _compare(outputs, results, report)
    _read_optimized(optimized, emitter.modules, report)
    _compare_layers(quantized, path, emitter, feeds, reference, report)


def _session(model: Any, **options: Any) -> Any:
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    for name, value in options.items():
        setattr(settings, name, value)
    return ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


def _run(path: Path, feeds: list[np.ndarray[Any, Any]]) -> tuple[list[np.ndarray[Any, Any]], Any]:
    import onnx

    optimized = path.with_name("optimized.onnx")
    session = _session(str(path), optimized_model_filepath=str(optimized))
    results = session.run(None, {entry.name: feed for entry, feed in zip(session.get_inputs(), feeds, strict=False)})
    return results, onnx.load(str(optimized), load_external_data=False)


def _compare(outputs: list[np.ndarray[Any, Any]], results: list[np.ndarray[Any, Any]], report: ExportReport) -> None:
    floats = [
        (expected, got.astype(np.float64))
        for expected, got in zip(outputs, results, strict=False)
        if expected.shape == got.shape and expected.size
    ]
    noise = sum(float(np.square(got - expected).sum()) for expected, got in floats)
    signal = sum(float(np.square(expected).sum()) for expected, _ in floats)
    report.sqnr_db = math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal > 0 and math.isfinite(noise) else -math.inf
    report.largest_difference = max((float(np.abs(got - expected).max()) for expected, got in floats), default=math.nan)
    if floats and floats[0][0].ndim:
        expected, got = floats[0]
        report.agreement = float((expected.argmax(-1) == got.argmax(-1)).mean())


def _read_optimized(model: Any, modules: dict[str, str], report: ExportReport) -> None:
    kinds: Counter[str] = Counter()
    islands: list[str] = []
    initializers = {entry.name for entry in model.graph.initializer}
    for node in model.graph.node:
        kinds[node.op_type] += 1
        if node.op_type in _HEAVY and sum(name not in initializers for name in node.input) > 0:
            module = modules.get(node.name.partition("/")[0], "")
            islands.append(f"{module} ({node.op_type})" if module else node.op_type)
    report.integer_nodes = {kind: count for kind, count in kinds.items() if kind.startswith(_INTEGER) or kind == "QLinearConv"}
    report.float_nodes = {kind: count for kind, count in kinds.items() if kind in _HEAVY}
    report.float_islands = list(dict.fromkeys(islands))
    report.conversions = sum(count for kind, count in kinds.items() if kind in _CONVERSIONS)


def _compare_layers(
    quantized: QuantizedModel,
    path: Path,
    emitter: Emitter,
    feeds: list[np.ndarray[Any, Any]],
    reference: dict[str, Tensor],
    report: ExportReport,
) -> None:
    """Look at each dequantized tensor: a second copy of the file with all of them as outputs."""
    import onnx

    model = onnx.load(str(path))
    names = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    wanted = [key for key in dict.fromkeys(emitter.order) if f"{key}_dequantized" in names and key in reference]
    for key in wanted:
        model.graph.output.append(onnx.helper.make_tensor_value_info(f"{key}_dequantized", onnx.TensorProto.FLOAT, None))
    whole = path.with_name("inspected.onnx")
    onnx.save(model, str(whole), save_as_external_data=model.ByteSize() > 1_900_000_000)
    session = _session(str(whole))
    inputs = {entry.name: feed for entry, feed in zip(session.get_inputs(), feeds, strict=False)}
    for key, got in zip(wanted, session.run([f"{key}_dequantized" for key in wanted], inputs), strict=True):
        expected = reference[key].float().cpu().numpy()
        if expected.shape != got.shape:
            continue
        steps = np.abs(got - expected) / float(quantized.activations[key].scale)
        report.layers.append(LayerDifference(key, float(steps.max(initial=0.0)), float(steps.mean()) if steps.size else 0.0))
