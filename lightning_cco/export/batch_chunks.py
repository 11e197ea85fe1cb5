"""Batches in pieces of the size that a file of fixed sizes takes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_cco.export.deployed_forward import Deployed
from lightning_cco.export.layouts import usual
from lightning_cco.number_format import number_of

MOST_SAMPLES = 16
"""So many samples are run in an engine at most: those for phones are slow on other processors."""


class Samples:
    """The inputs of a file with so many samples.

    Args:
        deployed: The forward.
        size: How many samples, if the model takes so many; else those of the example.

    Attributes:
        deployed: The forward.
        size: How many samples a file takes.
        example: The inputs to trace with.
        notes: What is to be said of them.
    """

    def __init__(self, deployed: Deployed, size: int) -> None:
        self.deployed, self.notes = deployed, list[str]()
        whole = tuple(map(usual, deployed.example))
        count = next((tensor.shape[0] for tensor in whole if tensor.dim()), 0)
        self._batched = [bool(tensor.dim()) and tensor.shape[0] == count for tensor in whole]
        self.size = size
        self.example = whole
        if count == size or not any(self._batched):
            return
        cut = self._cut(whole, 0)
        if count > size and self._runs(cut):
            self.example = cut
        else:
            why = "the example has fewer" if count < size else "the model does not take fewer"
            self.notes.append(f"the file takes {count} samples at once, not {size}: {why}")
            self.size = count

    def pieces(self, calls: Sequence[tuple[Tensor, ...]], most: int) -> tuple[list[tuple[Tensor, ...]], int]:
        """Calls in pieces of the file's size, some of each call; and how many calls have other sizes."""
        shapes = [tensor.shape for tensor in self.example]
        found: list[list[tuple[Tensor, ...]]] = []
        left_out = 0
        for tensors in calls:
            count = next((tensor.shape[0] for tensor, batched in zip(tensors, self._batched, strict=True) if batched), self.size)
            cuts = [self._cut(tensors, start) for start in range(0, count - self.size + 1, self.size)]
            fitting = [cut for cut in cuts if [tensor.shape for tensor in cut] == shapes]
            left_out += not fitting
            found.append(fitting)
        share = max(1, most // max(1, len(found) * self.size))
        return [cut for cuts in found for cut in cuts[:share]][:most], left_out

    def _cut(self, tensors: tuple[Tensor, ...], start: int) -> tuple[Tensor, ...]:
        return tuple(
            usual(tensor[start : start + self.size] if batched else tensor) for tensor, batched in zip(tensors, self._batched, strict=True)
        )

    def _runs(self, tensors: tuple[Tensor, ...]) -> bool:
        try:
            self.deployed(*tensors)
        except Exception:  # the model does not take this size
            return False
        return True


def left_out_of_the_check(left_out: int, count: int) -> list[str]:
    """What is said of batches that a file of fixed sizes does not take.

    >>> left_out_of_the_check(1, 3)
    ['1 of 3 batches: other sizes than the file takes, left out of the check']
    """
    return (
        [f"{left_out} of {number_of(count, 'batches', 'batch')}: other sizes than the file takes, left out of the check"]
        if left_out
        else []
    )
