"""Latency and size of exported INT8 files in ONNX Runtime, against the same float model and ONNX Runtime's own static quantization.

Run: ``python benchmarks/export_latency.py`` (batch 1, 224 × 224, two threads). The files take turns in one process. In its turn a file runs RUNS times, as
a deployed model does, and the median of all but the first WARM_UP counts; each ratio is the median over the turns.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from export_models import MobileNetV2, ResNet18, ViT, settled

from lightning_cco import quantize
from lightning_cco.monitoring.tables import markdown_table

MODELS: dict[str, Callable[[], torch.nn.Module]] = {"ResNet-18": ResNet18, "MobileNetV2": MobileNetV2, "ViT-tiny": ViT}


class Reader(CalibrationDataReader):
    """Feeds the calibration batches."""

    def __init__(self, batches: list[np.ndarray]) -> None:
        self.left = [{"x": batch} for batch in batches]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop(0) if self.left else None


RUNS, WARM_UP = 15, 5


def session(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # The engine's default, but for this: the idle threads of one session do not spin on while another is being timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def ratios(sessions: dict[str, ort.InferenceSession], feed: np.ndarray, rounds: int) -> dict[str, tuple[float, float]]:
    """Median latency in ms, and median of float latency over this one's, turn by turn."""
    turns: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(rounds):
        for name, one in sessions.items():
            times = []
            for _ in range(RUNS):
                start = time.perf_counter()
                one.run(None, {one.get_inputs()[0].name: feed})
                times.append(1e3 * (time.perf_counter() - start))
            turns[name].append(statistics.median(times[WARM_UP:]))
    return {
        name: (statistics.median(taken), statistics.median(f / t for f, t in zip(turns["float"], taken, strict=True)))
        for name, taken in turns.items()
    }


def measure(name: str, folder: Path, threads: int, rounds: int) -> list[str]:
    torch.manual_seed(0)
    model = settled(MODELS[name]())
    batches = [torch.randn(1, 3, 224, 224) for _ in range(4)]
    torch.onnx.export(model, (batches[0],), folder / "float.onnx", dynamo=True, opset_version=20, verbose=False, input_names=["x"])
    # As quantize_static does: every layer, the last one too.
    quantized = quantize(model, {"global_quantization_settings": {"skip_tail_quantization": False}}, (batches[0],))
    quantized.calibrate([batch] for batch in batches)
    report = quantized.export(folder / "int8.onnx")
    quantized.remove()
    quant_pre_process(str(folder / "float.onnx"), str(folder / "prepared.onnx"))
    quantize_static(
        str(folder / "prepared.onnx"),
        str(folder / "static.onnx"),
        Reader([batch.numpy() for batch in batches]),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    found = ratios({kind: session(folder / f"{kind}.onnx", threads) for kind in ("float", "int8", "static")}, batches[0].numpy(), rounds)
    sizes = {kind: sum(path.stat().st_size for path in folder.glob(f"{kind}.onnx*")) for kind in ("float", "int8", "static")}
    print(f"\n{name}\n{report}", flush=True)
    return [
        name,
        f"{found['float'][0]:.1f}",
        f"{found['int8'][1]:.2f}",
        f"{found['static'][1]:.2f}",
        f"{found['int8'][1] / found['static'][1]:.2f}",
        f"{sizes['int8'] / sizes['float']:.3f}",
        f"{sizes['static'] / sizes['float']:.3f}",
        f"{report.sqnr_db:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, Path(folder), options.threads, options.rounds))
    header = [
        "model",
        "float ms",
        "INT8 speed ÷ float",
        "quantize_static speed ÷ float",
        "INT8 ÷ quantize_static",
        "INT8 size ÷ float",
        "quantize_static size ÷ float",
        "SQNR dB",
    ]
    print(
        f"\n{platform.processor() or platform.machine()}, {options.threads} threads, onnxruntime {ort.__version__}, torch {torch.__version__}\n"
    )
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
