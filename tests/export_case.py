"""What the export tests share: models with examples, calibration, and a run in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from export_models import Decoder, LSTMClassifier, MobileNetV2, ResNet18, UNet, ViT, settled
from models import GuideCNN, ResidualCNN, TokenModel
from torch import Tensor, nn

from lightning_cco import QuantizedModel, quantize
from lightning_cco.export.ort_session import engine_session


def images(size: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(4, 3, size, size)


def tokens(vocabulary: int, length: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, vocabulary, (4, length))


STAGES = ((1, 16, 1, 1), (6, 24, 2, 2))
MODELS = {
    "cnn": (GuideCNN, GuideCNN.example, 2),
    "residual": (ResidualCNN, ResidualCNN.example, 7),
    "mobilenet": (lambda: MobileNetV2(STAGES, 64, 10), images(32), 11),
    "resnet18": (lambda: ResNet18(8, 10), images(64), 20),
    "unet": (UNet, images(16), 5),
    "lstm": (LSTMClassifier, tokens(30, 7), 0),
    "vit": (lambda: ViT(24, 2, 2, 32, 8, 10), images(32), 1),
    "decoder": (Decoder, tokens(50, 9), 0),
    "tokens": (TokenModel, TokenModel.example, 0),
}


def calibrated(model: nn.Module, example: Callable[[], Tensor], settings: Any = None) -> tuple[QuantizedModel, Tensor]:
    torch.manual_seed(0)
    x = example()
    quantized = quantize(settled(model), settings, (x,))
    quantized.calibrate([(x,), (example(),)])
    return quantized, x


def run(path: Path, *arrays: Tensor, optimize: bool = True) -> np.ndarray:
    # Without optimization: each operator of the file as it stands, in float between quantize and dequantize.
    levels = ort.GraphOptimizationLevel
    session = engine_session(str(path), graph_optimization_level=levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL)
    return session.run(None, {entry.name: array.numpy() for entry, array in zip(session.get_inputs(), arrays, strict=True)})[0]
