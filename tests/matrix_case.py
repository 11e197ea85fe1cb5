"""What a model of the matrix is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cco.quantization.forward_call import call_with


@dataclass(frozen=True)
class Case:
    """A model and a batch for it.

    Attributes:
        name: Shown as the test's id.
        make: Builds the model.
        batch: Makes the arguments of its forward: positional as a tuple, named as a dict.
        run: How a batch goes through the model.
        other_batch: One that takes another path through a model whose path depends on data.
        twice: Whether ``run`` calls a network twice, on tensors of different origin: the quantizer of its input is named after the first.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[], Any]
    run: Callable[[nn.Module, Any], Any] = call_with
    other_batch: Callable[[], Any] | None = None
    twice: bool = False


def image(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(*shape),)


def tokens(*shape: int, vocabulary: int = 20) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randint(0, vocabulary, shape),)
