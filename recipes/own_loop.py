"""Without a Trainer: the same compression in a training loop of one's own.

Run: ``python recipes/own_loop.py``
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from digits import DigitsData, DigitsModule

from lightning_cco import QuantizedModel, quantize


def main(argv: Sequence[str] | None = None) -> QuantizedModel:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a few steps only")
    options = parser.parse_args(argv)
    torch.manual_seed(1)
    data = DigitsData()
    data.setup()
    batches = list(data.train_dataloader())[: 3 if options.fast else None]
    model = DigitsModule()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def train_an_epoch() -> None:
        model.train()
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

    def accuracy() -> float:
        model.eval()
        with torch.no_grad():
            (images, labels) = next(iter(data.val_dataloader()))
            return float((model(images).argmax(-1) == labels).float().mean())

    for _ in range(1 if options.fast else 8):
        train_an_epoch()
    print(f"float: {accuracy():.3f}")

    quantized = quantize(model, "w8a8", example_args=batches[0][:1])
    quantized.calibrate([images] for images, _ in batches[:20])
    print(f"INT8, calibrated only: {accuracy():.3f}")
    for _ in range(1 if options.fast else 3):
        train_an_epoch()
    quantized.freeze_ranges()
    print(f"INT8, trained: {accuracy():.3f}")
    report = quantized.sensitivity([images] for images, _ in batches[:2])
    worst = report.worst_first()[0]
    print(f"most sensitive layer: {worst.name} (QS {worst.qs:.3g}, {worst.sqnr_db:.1f} dB)")
    print(quantized)
    return quantized


if __name__ == "__main__":
    main()
