"""Runs a table of networks on each engine, and writes docs/engines.md.

Run: ``python tests/engine_table.py ENGINE`` in an environment of that engine (the results are kept in ``outputs/engines``), then ``python tests/engine_table.py
--write``; `make test-engines` does both, in environments that it makes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "benchmarks")]
import engine_speed  # noqa: E402
from export_models import Decoder, LSTMClassifier, MobileNetV2, ResNet18, UNet, ViT, settled  # noqa: E402

from lightning_cco import CCOError, quantize  # noqa: E402
from lightning_cco.export.engine_patterns import adds_products_exactly  # noqa: E402
from lightning_cco.export.engines import ENGINES  # noqa: E402
from lightning_cco.export.report import ExportReport  # noqa: E402

OUT, PAGE = HERE.parent / "outputs" / "engines", HERE.parent / "docs" / "engines.md"
MARKS = "<!-- results -->", "<!-- /results -->"
PACKAGES = {
    "ort": ("onnxruntime",),
    "openvino": ("openvino", "onnxruntime"),
    "executorch": ("executorch",),
    "litert": ("litert-torch", "ai-edge-litert"),
    "coreml": ("coremltools",),
    "qnn": ("onnxruntime-qnn", "onnxruntime"),
}


class Generator(nn.Module):
    """Transposed convolutions, as decoders of images have them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Sequential(
            nn.ConvTranspose2d(8, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.ConvTranspose2d(16, 8, 2, 2), nn.ReLU()
        )
        self.out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.up(x))


def images(size: int, channels: int = 3) -> Callable[[], Tensor]:
    return lambda: torch.randn(4, channels, size, size)


def tokens(vocabulary: int, length: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, vocabulary, (4, length))


FEW = {"weights_num_bits": 4, "activations_num_bits": 4}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, Any]]] = {
    "CNN (ResNet)": (lambda: ResNet18(16, 10), images(64), {}),
    "depthwise (MobileNetV2)": (lambda: MobileNetV2(((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 2)), 128, 10), images(64), {}),
    "ViT": (lambda: ViT(96, 3, 3, 64, 8, 10), images(64), {}),
    "transformer with embedding": (lambda: Decoder(200, 96, 3, 32), tokens(200, 32), {}),
    "LSTM": (lambda: LSTMClassifier(100, 64), tokens(100, 16), {}),
    "transposed convolution": (Generator, images(16, 8), {}),
    "U-Net": (lambda: UNet(16), images(64), {}),
    "CNN of 4 bits": (lambda: ResNet18(16, 10), images(64), FEW),
}
"""Model, example, and settings beside those of INT8."""


def run(engine: str, keep: Callable[[dict[str, Any]], None], order: list[str] | None = None) -> None:
    """What the engine makes of each network; ``keep`` is given all results after each."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in order or NETWORKS:
        make, example, settings = NETWORKS[name]
        torch.manual_seed(0)
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            try:
                found[name] = _row(engine, settled(make()), example, settings, Path(folder))
            except CCOError as error:
                found[name] = {"refused": " ".join(str(error).split())[:300]}
        print(engine, name, found[name], flush=True)
        keep(found)


def _row(engine: str, model: nn.Module, example: Callable[[], Tensor], settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    x = example()
    overall = {"skip_tail_quantization": False, **settings}
    quantized = quantize(
        model,
        {
            "global_quantization_settings": overall,
            "deployment_settings": {"target_framework": engine, "vnni": None if adds_products_exactly() else False},
        },
        (x,),
    )
    quantized.calibrate([(x,), (example(),)])
    path = folder / f"model{ENGINES[engine].ending}"
    options: dict[str, Any] = {"dynamic_batch": False, "example_args": (x[:1],)} if path.suffix == ".onnx" else {}
    report = quantized.export(path, batches=[(example()[:1],) for _ in range(2)], **options)
    assert isinstance(report, ExportReport)
    own = report.target_nodes or report.integer_nodes
    row = {
        "sqnr_db": report.target_sqnr_db if report.target_sqnr_db == report.target_sqnr_db else report.sqnr_db,
        "largest_steps": report.target_largest_steps if report.target_nodes and ENGINES[engine].load is not None else report.largest_steps,
        "integer": own,
        "float": report.float_nodes
        if engine in ("ort", "executorch", "litert", "coreml")
        else report.target_floats
        if engine == "qnn"
        else {},
        "size_ratio": report.size_ratio,
    }
    quantized.remove()
    return row


def versions(engine: str) -> str:
    """Of what ran."""
    packages = ("torch", *PACKAGES[engine])
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def page(results: dict[str, Any], speeds: dict[str, Any], before: str) -> str:
    """The tables, as Markdown; those of engines that were not run stay as they stand in the page before."""
    stood = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", before, re.M | re.S))
    lines = (
        engine_speed.table(speeds, stood.get("Speed", ""))
        if speeds
        else [f"## Speed\n{stood['Speed']}".rstrip(), ""]
        if "Speed" in stood
        else []
    )
    for engine in PACKAGES:
        title, result = ENGINES[engine].title, results.get(engine)
        if result is None:
            lines += [f"## {title}\n{stood[title]}".rstrip(), ""] if title in stood else []
            continue
        lines += [f"## {title}", "", f"{result['versions']}; {result['machine']}.", ""]
        lines += ["| network | agreement, dB | most steps | in INT8 | in float | size |", "|---|---|---|---|---|---|"]
        for name, row in result["networks"].items():
            if "refused" in row:
                lines.append(f"| {name} | refused: {row['refused']} | | | | |")
                continue
            # OpenVINO tells what its products compute on; what is no product in INT8 is not listed.
            floats = "not counted" if engine == "openvino" else _counts(row["float"])
            lines.append(
                f"| {name} | {row['sqnr_db']:.0f} | {row['largest_steps']:.0f} | {_counts(row['integer'])} | {floats} | "
                f"{row['size_ratio']:.2f} |"
            )
        lines.append("")
    return "\n".join(lines)


def _counts(nodes: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(nodes.items(), key=lambda entry: (-entry[1], entry[0]))) or "nothing"


def _kept(kind: str) -> dict[str, Any]:
    """The results of a kind by engine."""
    paths = {name: OUT / f"{name}{kind}.json" for name in PACKAGES}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def main() -> None:
    """Run one engine, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", nargs="?", choices=list(PACKAGES))
    parser.add_argument("--networks", nargs="*", choices=list(NETWORKS), help="some of them alone; the results of others are kept")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    if options.engine:
        machine = f"Python {platform.python_version()}, {platform.machine()}, 1 thread"

        def keep(found: dict[str, Any]) -> None:
            path = OUT / f"{options.engine}.json"
            before = json.loads(path.read_text(encoding="utf-8"))["networks"] if options.networks and path.exists() else {}
            rows = {name: row for name in NETWORKS if (row := found.get(name, before.get(name))) is not None}
            result = {"versions": versions(options.engine), "machine": machine, "networks": rows}
            (OUT / f"{options.engine}.json").write_text(json.dumps(result, indent=2), encoding="utf-8")

        run(options.engine, keep, options.networks)
    if options.write:
        results, speeds = _kept(""), _kept(".speed")
        head, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
        stood, _, tail = rest.partition(MARKS[1])
        PAGE.write_text(f"{head}{MARKS[0]}\n{page(results, speeds, stood)}{MARKS[1]}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
