"""How networks are trained and judged in the benchmark of accuracy at few bits, for this library and for others alike: nothing of either is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fashion_data import Images
from torch import Tensor, nn

BATCH, CALIBRATION_BATCHES, FLOAT_EPOCHS = 64, 20, 4
BITS = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4), "w3a3": (3, 3), "w2a2": (2, 2)}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of scores, classes and images."""


def batches(data: Images) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch, in an order drawn from the global random state."""
    order = torch.randperm(len(data.train))
    for chosen in order[: len(order) // BATCH * BATCH].view(-1, BATCH):
        yield data.train[chosen], data.train_classes[chosen]


def calibration_batches(data: Images, seed: int) -> list[Tensor]:
    """The batches that everybody calibrates on."""
    torch.manual_seed(1000 + seed)
    return [images for _, (images, _) in zip(range(CALIBRATION_BATCHES), batches(data), strict=False)]


def train(
    model: nn.Module,
    data: Images,
    epochs: int,
    rate: float,
    start: float,
    each_step: Callable[[int], None] = lambda step: None,
    after_step: Callable[[float], None] = lambda share: None,
    loss_of: Loss = lambda scores, classes, images: F.cross_entropy(scores, classes),
    most_steps: int | None = None,
) -> None:
    """SGD with a cosine, after a rise from ``start * rate`` over a quarter of the steps unless ``start`` is 1.

    Args:
        model: What is trained, in the mode that it is in.
        data: The images.
        epochs: How often all of them.
        rate: Learning rate.
        start: Share of it that the training starts at.
        each_step: Called with its number before each step.
        after_step: Called after each step with the share of the learning rate that the next one has.
        loss_of: The loss of a step.
        most_steps: Where to stop, to try a training out.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, rate, momentum=0.9, nesterov=start < 1, weight_decay=5e-4 if start < 1 else 0.0)
    steps = len(data.train) // BATCH * epochs
    schedule: Any = (
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        if start == 1
        else torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, div_factor=1 / start)
    )
    step = 0
    for _ in range(epochs):
        for images, classes in batches(data):
            each_step(step)
            optimizer.zero_grad()
            loss_of(model(images), classes, images).backward()
            optimizer.step()
            schedule.step()
            after_step(optimizer.param_groups[0]["lr"] / rate)
            step += 1
            if step == most_steps:
                return


@torch.no_grad()
def accuracy(model: nn.Module, data: Images) -> float:
    """Per cent of the test's images, in the mode that the model is in."""
    found = torch.cat([model(images).argmax(1) for images in data.test.split(500)])
    return 100 * float((found == data.test_classes).float().mean())


def float_network(make: Callable[[], nn.Module], path: Path, data: Images, keep: bool) -> nn.Module:
    """The one float network of a kind, trained, or as an earlier run left it in a file."""
    torch.manual_seed(0)
    model = make().to(memory_format=torch.channels_last)
    if keep and path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    train(model.train(), data, FLOAT_EPOCHS, 0.1, 0.04)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model
