"""Speed of the INT8 files of an engine beside the float model in the same engine: one thread, one sample.

Run: ``python benchmarks/engine_speed.py ENGINE`` in an environment of that engine (`make engine-speed` runs all of them), with nothing else running. The two
files take turns in one process; in its turn a file runs RUNS times and the median counts, after WARM_UP runs that don't; the ratio is the median over the
turns. The results are kept in ``outputs/engines``; ``python tests/engine_table.py --write`` puts them into docs/engines.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent)]
from export_models import MobileNetV2, ResNet18, ViT, settled  # noqa: E402

from lightning_cco import CCOError, quantize  # noqa: E402
from lightning_cco.export.engine_patterns import adds_products_exactly, has_matrix_units  # noqa: E402
from lightning_cco.export.engines import ENGINES  # noqa: E402

OUT = HERE.parent / "outputs" / "engines"
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-18": (ResNet18, 224),
    "MobileNetV2": (MobileNetV2, 224),
    "ViT-tiny": (ViT, 224),
}
"""Networks as published, and the size of their images."""
RUNS, WARM_UP = 10, 2
Run = Callable[[], Any]


def ort(path: Path, x: Tensor) -> Run:
    """A file in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feeds)


def openvino(path: Path, x: Tensor) -> Run:
    """A file in OpenVINO, with floats of 32 bits also where the processor has shorter ones."""
    from openvino import Core

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    request, array = Core().compile_model(str(path), "CPU", options).create_infer_request(), x.numpy()
    return lambda: request.infer([array])


def executorch(path: Path, x: Tensor) -> Run:
    """A file in ExecuTorch, which takes as many threads as there are cores, whatever OMP_NUM_THREADS says."""
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime, Verification

    if portable_lib._threadpool_get_thread_count() != 1:  # before the first method: those loaded before would use the threads that end here
        portable_lib._unsafe_reset_threadpool(1)
    program = Runtime.get().load_program(path, verification=Verification.Minimal)
    method = program.load_method("forward")
    return lambda: (program, method.execute([x]))  # the method does not keep its program


def litert(path: Path, x: Tensor) -> Run:
    """A file in LiteRT's interpreter, what it takes rounded before."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    entry = interpreter.get_input_details()[0]
    scale, zero = entry["quantization"]
    value = (x / scale).round().add(zero).clamp(-128, 127) if scale else x
    interpreter.set_tensor(entry["index"], value.numpy().astype(entry["dtype"]))
    return interpreter.invoke  # type: ignore[no-any-return]


LOADERS: dict[str, Callable[[Path, Tensor], Run]] = {"ort": ort, "openvino": openvino, "executorch": executorch, "litert": litert}
PACKAGES = {"ort": "onnxruntime", "openvino": "openvino", "executorch": "executorch", "litert": "ai-edge-litert"}
"""Engines that run on this processor as they do on others: QNN's simulator and Core ML's reader are no measure."""


def files(engine: str, model: nn.Module, size: int, folder: Path) -> tuple[dict[str, Path], Tensor]:
    """The float file and the INT8 file."""
    entry, x, example = ENGINES[engine], torch.randn(1, 3, size, size), torch.randn(2, 3, size, size)
    paths = {kind: folder / f"{kind}{entry.ending}" for kind in ("float", "int8")}
    if entry.start is None:
        torch.onnx.export(model, (x,), paths["float"], dynamo=True, opset_version=20, external_data=False, verbose=False)
    else:
        torch.export.save(torch.export.export(model, (x,), strict=False), folder / "float.pt2")
        entry.start().convert(folder / "float.pt2", paths["float"])
    recipe = {
        "global_quantization_settings": {"skip_tail_quantization": False},
        "deployment_settings": {"target_framework": engine, "vnni": None if adds_products_exactly() else False},
    }
    quantized = quantize(model, recipe, (example,))
    quantized.calibrate([(example,), (torch.randn(2, 3, size, size),)])
    options: dict[str, Any] = {"dynamic_batch": False, "example_args": (x,)} if entry.start is None else {}
    quantized.export(paths["int8"], batches=[(x,)], **options)
    quantized.remove()
    return paths, x


def ratios(runs: dict[str, Run], turns: int) -> dict[str, float]:
    """Milliseconds of each, and quartiles of float's time over the other's, turn by turn."""
    taken: dict[str, list[float]] = {kind: [] for kind in runs}
    for turn in range(turns):
        for kind in (*runs,) if turn % 2 else (*reversed(runs),):
            found = []
            for _ in range(RUNS + WARM_UP):
                start = time.perf_counter()
                runs[kind]()
                found.append(1e3 * (time.perf_counter() - start))
            taken[kind].append(statistics.median(found[WARM_UP:]))
    low, middle, high = statistics.quantiles([f / q for f, q in zip(taken["float"], taken["int8"], strict=True)], n=4)
    return {
        "float_ms": statistics.median(taken["float"]),
        "int8_ms": statistics.median(taken["int8"]),
        "ratio": middle,
        "low": low,
        "high": high,
    }


def processor() -> str:
    """Its name, and what it has for products of 8-bit integers."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found = dict(reversed([[part.strip() for part in line.partition(":")[::2]] for line in lines]))
        name = f"{found['model name']} (family {found['cpu family']}, model {found['model']})"
    except (OSError, KeyError):
        pass
    return f"{name}, {'with' if adds_products_exactly() else 'without'} VNNI{' and AMX' if has_matrix_units() else ''}"


def table(results: dict[str, Any], before: str = "") -> list[str]:
    """What the engines' results say, as lines of Markdown.

    Args:
        results: By engine.
        before: The table as it stands. Its rows of other engines, and of the same ones on other processors, stay.
    """
    if not results:
        return []
    lines = [
        "## Speed",
        "",
        "Float time over that of the INT8 file in the same engine: one thread, batch 1, 224 × 224, the networks as published with random weights, every layer "
        f"quantized (`benchmarks/engine_speed.py`: medians of {RUNS} runs by turns; in brackets the quartiles of the ratio over the turns).",
        "",
    ]
    lines += [f"| engine | {' | '.join(NETWORKS)} | processor |", f"|---|{'---|' * len(NETWORKS)}---|"]
    titles = [engine.title for engine in ENGINES.values()]
    stood = [line for line in before.splitlines() if line.startswith("| ") and any(line.startswith(f"| {title} ") for title in titles)]
    rows = {(_title(line, titles), line.split(" | ")[-1]): line for line in stood}
    for engine, result in results.items():
        cells = [_cell(result["networks"].get(name)) for name in NETWORKS]
        line = f"| {ENGINES[engine].title} {result['version']} | {' | '.join(cells)} | {result['processor']} |"
        rows[ENGINES[engine].title, line.split(" | ")[-1]] = line
    return [*lines, *(rows[key] for key in sorted(rows, key=lambda key: (titles.index(key[0]), key[1]))), ""]


def _title(line: str, titles: list[str]) -> str:
    return next(title for title in titles if line.startswith(f"| {title} "))


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not measured"
    if "refused" in row:
        return f"refused: {row['refused']}"
    return f"{row['ratio']:.2f} ({row['low']:.2f}–{row['high']:.2f}), {row['float_ms']:.1f} → {row['int8_ms']:.1f} ms"


def main() -> None:
    """Measure one engine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=list(LOADERS))
    parser.add_argument("--networks", nargs="*", choices=list(NETWORKS), default=list(NETWORKS), help="the results of others are kept")
    parser.add_argument("--turns", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    OUT.mkdir(parents=True, exist_ok=True)
    kept = OUT / f"{options.engine}.speed.json"
    rows = json.loads(kept.read_text(encoding="utf-8"))["networks"] if kept.exists() else {}
    for name in options.networks:
        make, size = NETWORKS[name]
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            try:
                paths, x = files(options.engine, settled(make()), size, Path(folder))
            except CCOError as error:
                rows[name] = {"refused": " ".join(str(error).split())[:300]}
            else:
                rows[name] = ratios({kind: LOADERS[options.engine](path, x) for kind, path in paths.items()}, options.turns)
        print(options.engine, name, rows[name], flush=True)
        result = {"version": importlib.metadata.version(PACKAGES[options.engine]), "processor": processor(), "networks": rows}
        kept.write_text(json.dumps(result, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
