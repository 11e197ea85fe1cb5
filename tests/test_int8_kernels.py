"""Only what an engine computes in INT8 is rounded; references are the float model and what ONNX Runtime makes of the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from export_models import settled
from torch import Tensor, nn

from lightning_cco import QuantizedModel, quantize

Operation = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """Something between two convolutions, which run in INT8."""

    def __init__(self, operation: Operation | nn.Module) -> None:
        super().__init__()
        self.before, self.after, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.after(self.operation(torch.relu(self.before(x))))))


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(12, 16, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def _quantized(model: nn.Module, x: Tensor, settings: object = None) -> QuantizedModel:
    quantized = quantize(settled(model), settings, (x,))
    quantized.calibrate([x])
    return quantized


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_recurrent_layer_has_integer_weights_and_nothing_rounded_around_it(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12)
    quantized = _quantized(Recurrent(kind), x, {"layer_settings": [{"match": kind.lower(), "weights_num_bits": 5}]})
    decision = quantized.plan.decisions[kind.lower()]
    assert decision.weight_only
    assert decision.weights_num_bits == 5
    assert not quantized.plan.tensors
    assert not quantized.plan.quantized
    with torch.no_grad():
        got = quantized.model(x)
        with quantized.disabled():
            plain = quantized.model(x)
            for name, parameter in quantized.model.rnn.named_parameters():
                if parameter.dim() == 2:  # what the first layer reads are features of the user's, each of its own size
                    axis = 0 if name.startswith("weight_ih_l0") else 1
                    steps = parameter.abs().amax(axis, keepdim=True) / 15
                    parameter.copy_((parameter / steps).round() * steps)
            expected = quantized.model(x)
    assert torch.allclose(got, expected, atol=1e-6)
    assert not torch.allclose(got, plain, atol=1e-3)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_openvino_reads_recurrent_layers_in_float(kind: str) -> None:
    settings = {"deployment_settings": {"target_framework": "openvino"}}
    plan = _quantized(Recurrent(kind), torch.randn(2, 5, 12), settings).plan
    assert plan.skipped[kind.lower()] == f"{kind.lower()} is computed in float by openvino"
    assert not plan.weight_only
    assert not plan.tensors


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell"])
def test_features_of_unlike_size_keep_what_differs_between_inputs(kind: str) -> None:
    """Weights of the small features are the large ones; by row, rounding left 2 dB of what differs between inputs."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = getattr(nn, kind)(12, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.rnn(x)[0]
            return y if kind.endswith("Cell") else y[-1]

    torch.manual_seed(0)
    sizes = torch.logspace(1, -5, 12)
    model = Encoder()
    with torch.no_grad():
        weight = next(parameter for name, parameter in model.named_parameters() if "weight_ih" in name)
        weight /= sizes
    x = torch.rand(8, 12) * sizes if kind.endswith("Cell") else torch.rand(6, 8, 12) * sizes
    with torch.no_grad():
        expected = model(x)
        settings = {"global_quantization_settings": {"skip_tail_quantization": False}}
        error = _quantized(model, x, settings).model(x) - expected
    assert error.abs().max() > 0
    varying, error = expected - expected.mean(0), error - error.mean(0)
    assert error.square().sum() < 1e-3 * varying.square().sum()


FORMS = {
    "sub": (lambda x: x - x.flip(3), False),
    "div": (lambda x: x / 3, False),
    "a number added": (lambda x: x + 1.5, False),
    "two tensors added": (lambda x: x + x.flip(3), True),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), False),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2.0), True),
    "uneven pooling": (lambda x: F.adaptive_avg_pool2d(x, 3), False),
    "mean of rows": (lambda x: x.mean(3, keepdim=True), False),
    "mean of images": (lambda x: x.mean(dim=(2, 3), keepdim=True), True),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_a_layer_looks_like_decides_whether_it_runs_in_int8(form: str) -> None:
    operation, in_int8 = FORMS[form]
    torch.manual_seed(0)
    quantized = _quantized(Between(operation), torch.randn(2, 3, 8, 8))
    layer = next(layer.name for layer in quantized.graph if layer.kind in ("sub", "div", "add", "interpolate", "adaptive_avg_pool", "mean"))
    assert (layer in quantized.plan.quantized) == in_int8


@pytest.mark.parametrize("layer", ["transposed", "norm", "reflected"])
def test_the_engine_computes_in_int8_what_is_planned_so(layer: str, tmp_path: Path) -> None:
    layers = {
        "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2, groups=2), nn.ReLU()),
        "norm": lambda: nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()),
        "reflected": lambda: nn.ReflectionPad2d(1),
    }
    torch.manual_seed(0)
    quantized = _quantized(Between(layers[layer]()), torch.randn(2, 3, 8, 8))
    report = quantized.export(tmp_path / "model.onnx")
    assert not [island for island in report.float_islands if "planned in INT8" in island.reason]
    assert report.integer_nodes["QLinearConv"] == (3 if layer == "norm" else 2)
    assert report.sqnr_db > 40


class Mixer(nn.Module):
    """A linear layer over the last axis, and a norm over the second."""

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.mix, self.norm, self.head = nn.Linear(12, length), nn.BatchNorm1d(channels), nn.Linear(length, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.mix(x))))


@pytest.mark.parametrize(("channels", "length"), [(8, 16), (8, 8)])
def test_a_norm_over_other_channels_does_not_fold(channels: int, length: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    quantized = _quantized(Mixer(channels, length), torch.randn(4, channels, 12))
    assert "batch_norm" not in quantized.plan.groups.values()
    assert quantized.export(tmp_path / "model.onnx").sqnr_db > 40


def test_a_norm_of_batch_statistics_does_not_fold() -> None:
    norm = nn.BatchNorm2d(8, track_running_stats=False)
    quantized = quantize(Between(nn.Sequential(nn.Conv2d(8, 8, 1), norm)), None, (torch.randn(2, 3, 8, 8),))
    assert "batch_norm" in quantized.plan.skipped


def test_a_clamp_behind_a_float_layer_is_rounded_once() -> None:
    quantized = quantize(Between(nn.Sequential(nn.GroupNorm(2, 8), nn.ReLU())), None, (torch.randn(2, 3, 8, 8),))
    assert "relu_1" in quantized.plan.tensors
    assert "group_norm" not in quantized.plan.tensors
