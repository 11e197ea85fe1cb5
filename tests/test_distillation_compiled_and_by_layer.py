"""Distillation gives the gradients of a loop written by hand, too, where the step calls pieces, where it is compiled, and layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_distillation import DISTILLATION, Module, assert_same, by_hand, data, fitted, kl, twins
from torch import Tensor, nn


class Pieces(Module):
    """A step that calls an encoder and a decoder by themselves."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), F.cross_entropy)
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.ReLU())
        self.decoder = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.decoder(self.encoder(batch[0])), batch[1])


def test_pieces_of_the_teacher_read_each_other(tmp_path: Path) -> None:
    module, reference = twins(Pieces)
    fitted(tmp_path, module, data())
    assert_same(module, by_hand(reference, data(), kl))


@pytest.mark.parametrize("part", ["step", "net"])
def test_compiled(tmp_path: Path, part: str) -> None:
    module, reference = twins(lambda: Module(nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)), F.cross_entropy))
    if part == "net":
        module.net.compile(backend="aot_eager")
    fitted(tmp_path, module if part == "net" else torch.compile(module, backend="aot_eager"), data())
    assert_same(module, by_hand(reference, data(), kl))


def test_layers(tmp_path: Path) -> None:
    """The squared error of each layer with integer weights, relative to the float one."""
    module, reference = twins(
        lambda: Module(
            nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)), F.cross_entropy
        )
    )
    given: dict[tuple[int, bool], Tensor] = {}

    def watch(model: nn.Module) -> None:
        for number in (0, 2):
            model.net[number].register_forward_hook(
                lambda layer, args, output, number=number: given.__setitem__((number, torch.is_grad_enabled()), output)
            )

    watch(reference)
    settings = {**DISTILLATION, "on": "layers"}

    def term(student: Tensor, teacher: Tensor) -> Tensor:
        errors = [(given[n, True] - given[n, False]).square().sum() / given[n, False].square().sum() for n in (0, 2)]
        return sum(errors) / 2

    fitted(tmp_path, module, data(), settings)
    assert_same(module, by_hand(reference, data(), term))
