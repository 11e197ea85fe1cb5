"""A constant that something out of sight has written to holds values: NumPy in its memory, or an extension that is given its address."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_cco import quantize


class Reads(nn.Module):
    """Two layers, the second of which reads what a function has made of the first one's result."""

    def __init__(self, fill: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.fill = fill
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.register_buffer("kept", torch.zeros(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(self.fill(torch.relu(self.first(x)), self.kept))))


def written_by_numpy(x: Tensor, kept: Tensor) -> Tensor:
    out = torch.zeros(x.shape)
    out.numpy()[:] = x.detach().numpy()
    return out


def written_before_it_is_filled_in(x: Tensor, kept: Tensor) -> Tensor:
    out = torch.empty(len(x), 8).fill_(114.0)
    rows = out[:2].numpy()
    rows[:] = x[:2].detach().numpy()
    return out


def written_by_an_extension(x: Tensor, kept: Tensor) -> Tensor:
    out, values = x.new_zeros(x.shape), x.detach().contiguous()
    ctypes.memmove(out.data_ptr(), values.data_ptr(), values.numel() * 4)
    return out


def read_through_another_view(x: Tensor, kept: Tensor) -> Tensor:
    out = torch.zeros(x.shape)
    other = out.detach()
    out.numpy()[:] = x.detach().numpy()
    return other


def written_to_a_buffer(x: Tensor, kept: Tensor) -> Tensor:
    kept.numpy()[:] = x.detach().numpy()
    return kept


@pytest.mark.parametrize(
    "fill",
    [written_by_numpy, written_before_it_is_filled_in, written_by_an_extension, read_through_another_view, written_to_a_buffer],
)
def test_what_reads_a_constant_written_out_of_sight_is_captured(fill: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    quantized = quantize(Reads(fill).eval(), {"global_quantization_settings": {"skip_tail_quantization": False}}, (x,))
    assert {layer.path for layer in quantized.graph if layer.weighted} == {"first", "second", "head"}
    assert {"linear", "linear_1", "linear_2"} <= quantized.plan.quantized


def test_statistics_of_norms_stay_constants() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                y = self.norm(self.first(x))
            return self.head(y)

    x = torch.randn(4, 3, 8, 8)
    quantized = quantize(Model().train(), {"global_quantization_settings": {"skip_tail_quantization": False}}, (x,))
    assert not [layer.name for layer in quantized.graph if layer.kind == "unseen"]
    assert quantized.plan.groups["conv_1"] == "batch_norm_1"


class Block(nn.Module):
    def __init__(self, norm: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.layer(x)) + x)


class Twice(nn.Module):
    """A block that is called twice: the statistics of training are written to in between, and nothing counts it."""

    def __init__(self, norm: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.block, self.last = Block(norm, layer), copy.deepcopy(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.block(x)))


@pytest.mark.parametrize(
    ("norm", "layer", "shape"),
    [
        (nn.BatchNorm1d(4), nn.Linear(4, 4), (6, 4)),
        (nn.BatchNorm2d(4, momentum=None), nn.Conv2d(4, 4, 3, padding=1), (6, 4, 5, 5)),
        (nn.InstanceNorm2d(4, track_running_stats=True, affine=True), nn.Conv2d(4, 4, 1), (6, 4, 5, 5)),
        (nn.BatchNorm2d(4, affine=False), nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)), (6, 4, 5, 5)),
    ],
    ids=["batch norm", "cumulative", "instance norm", "spectral norm"],
)
def test_statistics_of_training_stay_constants(norm: nn.Module, layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Each call of a training is found in the plan: ranges of all tensors move."""
    model, x = Twice(norm, layer), torch.randn(shape)
    quantized = quantize(model.eval(), {"global_quantization_settings": {"skip_tail_quantization": False}}, (x,))
    quantized.calibrate([x])
    model.train()
    before = {key: (float(q.min_val), float(q.max_val)) for key, q in quantized.activations.items()}
    for _ in range(2):
        model(3 * torch.randn(shape)).square().mean().backward()
    quantized.update_ranges()
    assert [key for key, q in quantized.activations.items() if before[key] == (float(q.min_val), float(q.max_val))] == []
    assert quantized.drift == []
