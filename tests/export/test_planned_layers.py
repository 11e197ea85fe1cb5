"""What is planned in INT8 runs in INT8, and what is skipped runs in float: operations between layers, in ONNX Runtime.

That no layer is planned in INT8 and computed in float, or the other way round, is asserted for each export of the tests (`conftest`). Here are the operations.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import quantize
from lightning_cco.export.report import ExportReport

Operation = Callable[[Any, Tensor, Tensor], Tensor]
CLASSES = 10


class Between(nn.Module):
    """An operation between two layers that run in INT8; ``h`` is what it reads, ``x`` the input of the model."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.operation = operation
        self.first, self.other, self.second, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.weight, self.bias, self.table = nn.Parameter(torch.randn(16, 16) / 4), nn.Parameter(torch.randn(16)), nn.Embedding(CLASSES, 8)
        self.register_buffer("keep", torch.arange(16) % 2 == 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.second(self.operation(self, F.relu(self.first(x)), x))))

    def rows(self, x: Tensor) -> Tensor:
        return self.table((x[..., 0].abs() * 5).long().clamp(0, CLASSES - 1))


def _exact(z: Tensor) -> Tensor:
    """A rounding with a straight-through gradient: ``z`` is read by INT8 layers and in float."""
    return z + (z.round() - z).detach()


ONCE_IN_FLOAT: dict[str, Operation] = {
    "times a mask": lambda s, h, x: h * (x[..., :1] > 0),
    "times integers": lambda s, h, x: h * (x[..., :1] > 0).long(),
    "plus a mask": lambda s, h, x: h + (x[..., :1] > 0),
    "plus a part": lambda s, h, x: torch.add(h, s.other(h), alpha=0.5),
    "joined with a mask": lambda s, h, x: torch.cat([h[..., :15], x[..., :1] > 0], -1),
    "repeated": lambda s, h, x: h[..., :8].repeat_interleave(2, -1) + torch.cat([s.rows(x)] * 2, -1),
    "addmm of activations": lambda s, h, x: torch.addmm(s.other(h), h, s.weight),
    "addmm with factors": lambda s, h, x: torch.addmm(s.bias, h, s.weight, beta=0.5, alpha=2.0),
    "rounded in the open": lambda s, h, x: _exact(s.other(h)),
}
OPERATIONS: dict[str, Operation] = {
    "times a float mask": lambda s, h, x: h * (x[..., :1] > 0).float(),
    "times a buffer": lambda s, h, x: h * s.keep,
    "gated": lambda s, h, x: h * torch.sigmoid(s.other(h)),
    "gated by tanh": lambda s, h, x: h * torch.tanh(s.other(h)),
    "squared": lambda s, h, x: h**2,
    "times its mean": lambda s, h, x: h * h.mean(-1, keepdim=True),
    "plus a number": lambda s, h, x: h + 0.3,
    "plus a parameter": lambda s, h, x: h + s.bias,
    "from a number": lambda s, h, x: 1 - h,
    "divided": lambda s, h, x: h / (1 + s.other(h).abs()),
    "addmm": lambda s, h, x: s.bias.addmm(h, s.weight),
    "times a parameter": lambda s, h, x: h @ s.weight.t(),
    "parameter first": lambda s, h, x: (s.weight @ h.transpose(-1, -2)).transpose(-1, -2),
    "einsum": lambda s, h, x: torch.einsum("...i,ji->...j", h, s.weight),
    "attention": lambda s, h, x: (h @ h.transpose(-1, -2)).softmax(-1) @ h,
    "joined": lambda s, h, x: torch.cat([h[..., :8], s.other(h)[..., :8]], -1),
    "joined with a float": lambda s, h, x: torch.cat([h[..., :8], s.other(h)[..., :8].exp()], -1),
    "joined with the input": lambda s, h, x: torch.cat([h[..., :8], x[..., :8]], -1),
    "joined with a constant": lambda s, h, x: torch.cat([h[..., :15], h.new_ones(*h.shape[:-1], 1)], -1),
    "joined with rows": lambda s, h, x: torch.cat([h[..., :8], s.rows(x)], -1),
    "stacked": lambda s, h, x: torch.stack([h[..., :8], s.rows(x)], -1).flatten(-2),
    "clamped twice": lambda s, h, x: F.relu(s.other(h)).clamp(max=1.5),
    "clamped below zero": lambda s, h, x: s.other(h).clamp(-1, -0.1),
    "clamped by a tensor": lambda s, h, x: s.other(h).clamp(min=s.bias),
    "chosen": lambda s, h, x: torch.where(x[..., :1] > 0, h, s.other(h)),
    "filled": lambda s, h, x: h.masked_fill(x[..., :1] > 0, 0.0),
    "turned round": lambda s, h, x: h + h.flip(-1),
    "rolled": lambda s, h, x: h.roll(1, -1),
    "padded": lambda s, h, x: F.pad(h[..., 1:-1], (1, 1), value=0.5),
    "glu": lambda s, h, x: F.glu(torch.cat([h, s.other(h)], -1)),
    "leaky relu": lambda s, h, x: F.leaky_relu(s.other(h)),
    "prelu": lambda s, h, x: F.prelu(s.other(h), s.bias[:1]),
    "hardswish": lambda s, h, x: F.hardswish(s.other(h)),
    "layer norm": lambda s, h, x: F.layer_norm(s.other(h), (16,)),
    "outer product": lambda s, h, x: torch.einsum("...i,...j->...ij", h[..., :4], h[..., :4]).flatten(-2),
    "read by topk": lambda s, h, x: h + h.topk(1, -1).values,
    "read by argmax": lambda s, h, x: h + s.other(h).argmax(-1, keepdim=True),
}


def exported(model: nn.Module, x: list[Tensor], path: Path, **settings: Any) -> ExportReport:
    quantized = quantize(model.eval(), settings, (x[0],))
    quantized.calibrate(x)
    return quantized.export(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("operation", "dimensions"),
    [
        *((name, 2) for name in ONCE_IN_FLOAT),
        *(pytest.param(name, 3, marks=pytest.mark.slow) for name in ONCE_IN_FLOAT if "addmm" not in name),
        *(pytest.param(name, size, marks=pytest.mark.slow) for name in OPERATIONS for size in (2, 3) if name != "addmm" or size == 2),
    ],
)
def test_an_operation_between_two_layers_runs_as_planned(operation: str, dimensions: int, tmp_path: Path) -> None:
    x = [torch.randn(4, 16) if dimensions == 2 else torch.randn(4, 5, 16) for _ in range(3)]
    report = exported(Between({**ONCE_IN_FLOAT, **OPERATIONS}[operation]), x, tmp_path / "a.onnx")
    assert sum(report.integer_nodes.values()) >= 2  # the layers before and after it


class Book(nn.Module):
    """A convolution whose result is compared with the rows of a table, as it is, and read by a convolution, rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.encode, self.decode = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 3)
        self.book, self.last = nn.Embedding(6, 4), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(F.relu(self.first(x)))
        rows = z.permute(0, 2, 3, 1)
        nearest = torch.cdist(rows.flatten(0, 2), self.book.weight).argmin(-1).reshape(rows.shape[:3])
        chosen = self.book(nearest).permute(0, 3, 1, 2)
        return self.last(F.relu(self.decode(z + (chosen - z).detach())))


def test_a_convolution_whose_result_is_needed_as_it_is_has_integer_weights_alone(tmp_path: Path) -> None:
    x = [torch.randn(2, 3, 9, 9) for _ in range(3)]
    quantized = quantize(Book().eval(), None, (x[0],))
    assert "needed as it is" in quantized.plan.skipped["conv_1"]
    quantized.calibrate(x)
    report = quantized.export(tmp_path / "a.onnx")
    assert any("conv_1" in island.layers for island in report.float_islands)


def _layers(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules)


def _images(middle: nn.Module, *after: nn.Module) -> nn.Sequential:
    return _layers(nn.Conv2d(3, 8, 3), nn.ReLU(), middle, *after, nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))


SKIPPED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "convolution": (lambda: _images(nn.Conv2d(8, 8, 3), nn.ReLU()), (2, 3, 9, 9), "2"),
    "bare convolution": (lambda: _images(nn.Conv2d(8, 8, 3)), (2, 3, 9, 9), "2"),
    "norm": (lambda: _images(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6()), (2, 3, 9, 9), "2"),
    "pooled": (lambda: _images(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.MaxPool2d(2)), (2, 3, 9, 9), "2"),
    "transposed": (lambda: _images(nn.ConvTranspose2d(8, 8, 2, 2), nn.ReLU()), (2, 3, 9, 9), "2"),
    "linear": (
        lambda: _layers(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)),
        (4, 8),
        "2",
    ),
    "linear on rows": (
        lambda: _layers(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)),
        (4, 5, 8),
        "2",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("vnni", [None, True])
@pytest.mark.parametrize("kind", SKIPPED)
def test_a_skipped_layer_is_computed_from_its_float_weights(kind: str, vnni: bool | None, tmp_path: Path) -> None:
    build, shape, path = SKIPPED[kind]
    model, x = build().eval(), [torch.randn(shape) for _ in range(3)]
    model(x[0])
    # Weights that one scale for all would leave nothing of: rounded to its 255 levels, all but the first output are 0.
    with torch.no_grad():
        weight = model.get_submodule(path).weight
        weight[:, 1:] *= 1e-4 if kind == "transposed" else 1
        weight[1:] *= 1 if kind == "transposed" else 1e-4
    rules = [{"match": path, "skip_quantization": True}]
    report = exported(model, x, tmp_path / "a.onnx", layer_settings=rules, deployment_settings={"vnni": vnni})
    products = sum(count for kind, count in report.float_nodes.items() if kind.endswith(("Conv", "ConvTranspose", "Gemm", "MatMul")))
    assert products == 2  # this layer, and the last one
    # Of sums with int8 weights a processor without VNNI, which may be this one, cuts off what does not fit.
    if vnni is None:
        session = ort.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
        got = session.run(None, {session.get_inputs()[0].name: x[1].numpy()})[0]
        assert np.abs(got - model(x[1]).detach().numpy()).max() < 0.02 * np.abs(got).max()
