"""Checkpoints are done without in the threads that ask for it, and in no others."""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from lightning_cco.compat.checkpointing import unrecomputed


def runs() -> int:
    """How often a reentrant checkpoint runs what it holds, in a forward and a backward."""
    count = 0

    def held(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return x.sin()

    checkpoint(held, torch.ones(2, requires_grad=True), use_reentrant=True).sum().backward()
    return count


def test_blocks_of_two_threads_end_in_any_order() -> None:
    begun, end, inside = threading.Event(), threading.Event(), []

    def other() -> None:
        with unrecomputed():
            begun.set()
            end.wait(10)
            inside.append(runs())

    thread = threading.Thread(target=other)
    with unrecomputed():
        thread.start()
        begun.wait(10)
        assert runs() == 1
    assert runs() == 2  # this thread's block is over, the other's is not
    end.set()
    thread.join()
    assert inside == [1]
    assert runs() == 2
    assert torch.utils.checkpoint.CheckpointFunction is CheckpointFunction
