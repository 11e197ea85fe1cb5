"""From which relative error on a layer is better skipped: its local error after calibration against the accuracy that skipping it brings back.

Six small networks, trained in float on scikit-learn's scans of digits, are calibrated at several bits. For each layer there are two measurements beside its
error: the accuracy when it alone is quantized, and when it alone is skipped.

Run: ``python benchmarks/skip_threshold.py`` (five minutes or so)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from report import Table, parser, publish
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lightning_cco as cc

BITS = ((8, 8), (4, 8), (4, 4), (3, 3), (2, 8))
EDGES = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0, float("inf"))


class Residual(nn.Module):
    """One residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(1, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(3))
        self.hidden, self.head = nn.Linear(16, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norms[0](self.stem(x[:, None])))
        x = torch.relu(x + self.norms[2](self.second(torch.relu(self.norms[1](self.first(x))))))
        return self.head(torch.relu(self.hidden(nn.functional.max_pool2d(x, 2).mean((2, 3)))))


def depthwise() -> nn.Module:
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 24, 3, 1, 1), nn.BatchNorm2d(24), nn.ReLU6()]
    for stride in (1, 2, 1):
        layers += [
            nn.Conv2d(24, 24, 3, stride, 1, groups=24),
            nn.BatchNorm2d(24),
            nn.ReLU6(),
            nn.Conv2d(24, 24, 1),
            nn.BatchNorm2d(24),
            nn.ReLU6(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))


class Recurrent(nn.Module):
    """Reads an image row by row; ``spread``: columns whose sizes differ by orders of magnitude, as in unnormalised spectra."""

    def __init__(self, spread: float = 0.0) -> None:
        super().__init__()
        self.rnn, self.hidden, self.head = nn.LSTM(8, 48, batch_first=True), nn.Linear(48, 48), nn.Linear(48, 10)
        self.register_buffer("sizes", torch.logspace(spread / 4, -spread, 8))
        with torch.no_grad():
            self.rnn.weight_ih_l0 /= self.sizes

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.rnn(x * self.sizes)[0][:, -1])))


class Spread(nn.Module):
    """Features of very different sizes, which the first layer's weights make up for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.register_buffer("sizes", torch.logspace(1.5, -2.5, 64))
        with torch.no_grad():
            self.first.weight /= self.sizes

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x.flatten(1) * self.sizes)))))


class Transformer(nn.Module):
    """Reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=True)
        self.rows, self.positions = nn.Linear(8, 32), nn.Parameter(0.02 * torch.randn(8, 32))
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.rows(x) + self.positions).mean(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "depthwise": depthwise,
    "LSTM": Recurrent,
    "LSTM, spread columns": lambda: Recurrent(4.0),
    "linear, spread features": Spread,
    "transformer": Transformer,
}


@dataclass
class Data:
    """Images of 8 × 8 in [0, 1] and their digits."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls) -> Data:
        digits = load_digits()
        images, labels = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        return cls(images[order[:1200]], labels[order[:1200]], images[order[1200:]], labels[order[1200:]])

    def accuracy(self, model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(self.test).argmax(1) == self.test_labels).float().mean())


def trained(make: Callable[[], nn.Module], data: Data, epochs: int = 15) -> nn.Module:
    torch.manual_seed(0)
    model = make().train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(data.train)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.train[chosen]), data.train_labels[chosen]).backward()
            optimizer.step()
    return model.eval()


def calibrated(model: nn.Module, data: Data, bits: tuple[int, int], skipped: list[str]) -> cc.QuantizedModel:
    rules = [{"match": name, "skip_quantization": True} for name in skipped]
    settings: dict[str, Any] = {
        "global_quantization_settings": {"weights_num_bits": bits[0], "activations_num_bits": bits[1]},
        "layer_settings": rules,
    }
    quantized = cc.quantize(model, settings, (data.train[:64],))
    quantized.calibrate(data.train[:512].split(64))
    return quantized


def measured(name: str, model: nn.Module, data: Data, bits: tuple[int, int]) -> list[tuple[str, str, float, float, float, float]]:
    """For each weighted layer its name, the larger of its relative errors, and the accuracies: float, all quantized, it alone skipped."""
    full = data.accuracy(model)
    quantized = calibrated(model, data, bits, [])
    everything = data.accuracy(model)
    report = quantized.sensitivity(data.train[:128].split(64))
    layers = [layer for layer in report.local if quantized.graph[layer].weighted]
    quantized.remove()
    found = []
    for layer in layers:
        entry = report.local[layer]
        without = calibrated(model, data, bits, [layer])
        found.append((name, layer, max(entry.relative, entry.varying_relative), full, everything, data.accuracy(model)))
        without.remove()
    return found


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    data = Data.load()
    rows: list[tuple[str, str, float, float, float, float]] = []
    for name, make in NETWORKS.items():
        model = trained(make, data)
        for bits in BITS:
            rows += [(f"{name}, W{bits[0]}A{bits[1]}", *row[1:]) for row in measured(name, model, data, bits)]
    cells = []
    for low, high in itertools.pairwise(EDGES):
        inside = [row for row in rows if low <= row[2] < high]
        if not inside:
            continue
        lost = [100 * (full - everything) for _, _, _, full, everything, _ in inside]
        back = [100 * (skipped - everything) for _, _, _, _, everything, skipped in inside]
        best = max(inside, key=lambda row: row[5] - row[4])
        cells.append(
            [
                f"{low:g} to {high:g}",
                str(len(inside)),
                f"{sum(lost) / len(lost):.1f}",
                f"{sum(back) / len(back):.1f}",
                f"{100 * (best[5] - best[4]):.1f} ('{best[1]}' of {best[0]})",
            ]
        )
    header = ["relative error of the layer", "layers", "accuracy lost by the network, points", "brought back by skipping it, mean", "most"]
    note = "The larger of the errors of the whole output and of its batch-varying part, local, after calibration; no training."
    publish(Table("skip-threshold", "From which relative error on is a layer better skipped?", header, cells, [note]), options)


if __name__ == "__main__":
    main()
