"""Runs an exported file in ONNX Runtime and compares it with the fake-quantized model, tensor by tensor."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lightning_cco.errors import CCOError
from lightning_cco.export.emit import Emitter
from lightning_cco.export.report import ExportReport, FloatIsland, LayerDifference
from lightning_cco.graph.containers import tensors_in
from lightning_cco.quantization.model import QuantizedModel
from lightning_cco.quantization.quantizer import ActivationQuantizer
from lightning_cco.quantization.runtime import Phase

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one forward."""

_CONVERSIONS = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
_INTEGER = ("QLinear", "QGemm", "QAttention", "ConvInteger", "MatMulInteger", "MatMulNBits", "QEmbed", "QOrdered")
_PRODUCTS = {"linear", "matmul", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention"}
_AVERAGES = {"avg_pool", "adaptive_avg_pool", "mean"}
_HEAVY = {
    "Conv": {"conv"},
    "FusedConv": {"conv"},
    "NhwcFusedConv": {"conv"},
    "ConvTranspose": {"conv_transpose"},
    "Gemm": _PRODUCTS,
    "FusedGemm": _PRODUCTS,
    "MatMul": _PRODUCTS,
    "FusedMatMul": _PRODUCTS,
    "GlobalAveragePool": _AVERAGES,
    "AveragePool": _AVERAGES,
    "Add": {"add"},
    "Sub": {"sub"},
    "Mul": {"mul"},
    "Div": {"div"},
    "Concat": {"concat", "stack"},
    "LSTM": {"lstm"},
    "GRU": {"gru"},
    "RNN": {"rnn"},
}
"""Operators with weights or two inputs, and the kinds of layer that they come from."""


def call_of(batch: Any) -> Call:
    """The arguments that a batch stands for: a mapping gives keyword arguments, a tuple or list positional ones, anything else the one argument."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}


def check_file(quantized: QuantizedModel, path: Path, emitter: Emitter, calls: Sequence[Call], report: ExportReport) -> None:
    """Fill a report with what runs of the file show.

    Args:
        quantized: The model, the reference.
        path: The file.
        emitter: What wrote it.
        calls: What to run both on.
        report: Filled in place.

    Raises:
        CCOError: The file's outputs are not those of the model: another number, or another shape.
    """
    deployment = quantized.settings.deployment_settings
    # What is for another engine or another processor is run as it is written: this processor may have no exact product for int8 weights.
    as_written = not emitter.stored.target.unsigned_without_vnni or deployment.vnni is not None
    _read_optimized(quantized, _optimized(path), emitter.modules, report)
    names = list(dict.fromkeys(emitter.order))
    session, tensors = _inspected(path, names, as_written)
    sums = _Sums()
    for args, kwargs in calls:
        feeds = _feeds(session, args, kwargs)
        if not _fits(session, feeds):
            continue
        report.batches += 1
        reference: dict[str, Tensor] = {}

        def keep(name: str, output: Tensor | ActivationQuantizer, _: Tensor, reference: dict[str, Tensor] = reference) -> None:
            assert isinstance(output, Tensor)
            reference.setdefault(name, output.detach().clone())

        with quantized.evaluating(), quantized.runtime.doing(Phase.RECORD_QUANTIZED, keep):
            expected = [_array(tensor) for _, tensor in tensors_in(quantized.model(*args, **kwargs))]
        results = session.run(None, feeds)
        count = len(results) - len(tensors)
        sums.outputs(expected, results[:count])
        for key, got in zip(tensors, results[count:], strict=True):
            wanted = reference.get(key)
            if wanted is not None and tuple(wanted.shape) == got.shape:
                quantizer = quantized.activations[key]
                levels = got.astype(np.int32) - int(quantizer.zero_point)
                sums.layer(key, np.abs(levels - wanted.float().cpu().numpy() / float(quantizer.scale)))
    sums.tell(report, tensors)


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().cpu().double().numpy()


def _feeds(session: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays by the file's names of its inputs: keyword arguments by name, where they are single tensors, else in order."""
    names = [entry.name for entry in session.get_inputs()]
    named = {name: value for name, value in kwargs.items() if isinstance(value, Tensor) and name in names}
    others = [tensor for _, tensor in tensors_in([args, {name: value for name, value in kwargs.items() if name not in named}])]
    left = [name for name in names if name not in named]
    return {name: tensor.detach().cpu().numpy() for name, tensor in [*named.items(), *zip(left, others, strict=False)]}


def _fits(session: Any, feeds: dict[str, np.ndarray[Any, Any]]) -> bool:
    """Whether arrays have the sizes that the file fixes: held batches may be of other lengths than the example."""
    return all(
        all(not isinstance(size, int) or size == given for size, given in zip(entry.shape, feeds[entry.name].shape, strict=True))
        for entry in session.get_inputs()
        if entry.name in feeds
    )


def engine_session(model: Any, as_written: bool = False, **options: Any) -> Any:
    """A session as a user makes it; or one that computes each operator as it stands in the file, in float between dequantize and quantize."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    if as_written:
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for name, value in options.items():
        setattr(settings, name, value)
    return ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


def _optimized(path: Path) -> Any:
    """The graph that the engine makes of the file."""
    import onnx

    optimized = path.with_name("optimized.onnx")
    engine_session(str(path), optimized_model_filepath=str(optimized))
    return onnx.load(str(optimized), load_external_data=False)


def _inspected(path: Path, names: list[str], as_written: bool) -> tuple[Any, list[str]]:
    """A session of the file with its rounded tensors, as integers, for further outputs, and the names of their quantizers."""
    import onnx

    model = onnx.load(str(path))
    types = {entry.name: entry.data_type for entry in model.graph.initializer}
    made = {
        node.output[0]: types[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[2] in types
    }
    tensors = [name for name in names if f"{name}_quantized" in made]
    for name in tensors:
        output = f"{name}_quantized"
        model.graph.output.append(onnx.helper.make_tensor_value_info(output, made[output], None))
    whole = path.with_name("inspected.onnx")
    onnx.save(model, str(whole), save_as_external_data=model.ByteSize() > 1_900_000_000)
    return engine_session(str(whole), as_written), tensors


class _Sums:
    """What is added up over the batches."""

    def __init__(self) -> None:
        self.noise = self.signal = self.absolute = self.largest = 0.0
        self.count = self.rows = self.agreeing = 0
        self.steps: dict[str, tuple[float, float, int]] = {}

    def outputs(self, expected: list[np.ndarray[Any, Any]], results: list[np.ndarray[Any, Any]]) -> None:
        shapes = [array.shape for array in expected], [array.shape for array in results]
        if shapes[0] != shapes[1]:
            raise CCOError(
                f"export: the file's outputs have the shapes {shapes[1]}, the model's {shapes[0]}. No file was written. "
                "If the model gives another number of tensors in evaluation, export in that form; if a size is fixed in the code, pass dynamic_batch=False."
            )
        for number, (wanted, result) in enumerate(zip(expected, results, strict=True)):
            got = result.astype(np.float64)
            difference = np.abs(got - wanted)
            self.noise += float(np.square(difference).sum())
            self.signal += float(np.square(wanted).sum())
            self.absolute += float(difference.sum())
            self.count += difference.size
            self.largest = max(self.largest, float(difference.max(initial=0.0)))
            if number == 0 and wanted.ndim and wanted.size:
                same = wanted.argmax(-1) == got.argmax(-1)
                self.agreeing, self.rows = self.agreeing + int(same.sum()), self.rows + same.size

    def layer(self, key: str, steps: np.ndarray[Any, Any]) -> None:
        largest, total, count = self.steps.get(key, (0.0, 0.0, 0))
        self.steps[key] = max(largest, float(steps.max(initial=0.0))), total + float(steps.sum()), count + steps.size

    def tell(self, report: ExportReport, order: list[str]) -> None:
        if not math.isfinite(self.noise):
            report.sqnr_db = -math.inf
        elif self.noise == 0:
            report.sqnr_db = math.inf
        else:
            report.sqnr_db = 10 * math.log10(self.signal / self.noise) if self.signal > 0 else -math.inf
        report.largest_difference, report.mean_difference = self.largest, self.absolute / max(1, self.count)
        report.agreement = self.agreeing / self.rows if self.rows else math.nan
        for key in order:
            if key in self.steps:
                largest, total, count = self.steps[key]
                report.layers.append(LayerDifference(key, largest, total / max(1, count)))


def _read_optimized(quantized: QuantizedModel, model: Any, modules: dict[str, str], report: ExportReport) -> None:
    kinds: Counter[str] = Counter()
    constants = {entry.name for entry in model.graph.initializer}
    sizes: set[str] = set()
    for node in model.graph.node:
        varying = {name for name in node.input if name and name not in constants}
        if node.op_type in ("Shape", "Size") or (varying and varying <= sizes):
            sizes.update(node.output)  # what is computed from sizes alone is no layer's
            continue
        kinds[node.op_type] += 1
        if node.op_type in _HEAVY and varying:
            island = _island(quantized, node.op_type, modules.get(node.name.partition("/")[0]))
            report.float_islands += [island] if island is not None and island not in report.float_islands else []
    report.integer_nodes = {kind: count for kind, count in kinds.items() if kind.startswith(_INTEGER)}
    report.float_nodes = {kind: count for kind, count in kinds.items() if kind in _HEAVY}
    report.conversions = sum(count for kind, count in kinds.items() if kind in _CONVERSIONS)


def _island(quantized: QuantizedModel, operator: str, module: str | None) -> FloatIsland | None:
    """The layers behind a node that computes in float, and why; `None` for what belongs to a layer that runs in INT8, such as the bias of a product."""
    plan = quantized.plan
    inside = [layer for layer in quantized.graph if layer.path == (module or "") and layer.kind != "output"]
    layers = [layer.name for layer in inside if layer.kind in _HEAVY[operator]]
    if operator == "Add" and not layers and any(layer.kind in _PRODUCTS and layer.name in plan.quantized for layer in inside):
        return None
    in_float = [name for name in layers if name in plan.skipped]
    if in_float:
        return FloatIsland(operator, tuple(in_float), plan.skipped[in_float[0]])
    reason = "planned in INT8, but the engine computes it in float" if layers else "part of another layer's computation"
    return FloatIsland(operator, tuple(layers or [f"module '{module}'" if module else "the model itself"]), reason)
