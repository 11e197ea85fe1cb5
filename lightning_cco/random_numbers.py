"""This process's random numbers of Python, NumPy and PyTorch: compared, put back, and drawn before their time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng


class RandomState:
    """The global random states, as they are when this is made.

    Args:
        device: A GPU whose state is another one of them.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._python, self._numpy, self._torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._gpu = (torch.cuda.get_rng_state(device), device) if device is not None and device.type == "cuda" else None

    def differs(self, other: RandomState) -> set[str]:
        """Whose numbers another state has not the same of: ``python``, ``numpy``, ``torch``."""
        (name, keys, *rest), (other_name, other_keys, *other_rest) = self._numpy, other._numpy
        same = {
            "python": self._python == other._python,
            "numpy": (name, rest) == (other_name, other_rest) and np.array_equal(keys, other_keys),
            "torch": torch.equal(self._torch, other._torch),
        }
        return {library for library, equal in same.items() if not equal}

    def restore(self) -> None:
        """Draw from here on."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._gpu is not None:
            torch.cuda.set_rng_state(*self._gpu)


@contextmanager
def isolated_random() -> Iterator[None]:
    """Lightning's `isolate_rng`, which alone restores nothing after an exception, such as that of a generator that is closed early."""
    stack = ExitStack()
    stack.enter_context(isolate_rng())
    try:
        yield
    finally:
        stack.close()


class DrawnEarly:
    """Watches the random numbers that are drawn before their time, inside of its blocks.

    Example:
        >>> early = DrawnEarly()
        >>> with early:
        ...     seed = torch.randint(9, ())
        >>> early.used, early.due
        (True, True)
    """

    def __init__(self) -> None:
        self._drawn: set[str] = set()
        self._after = RandomState()

    def __enter__(self) -> None:
        self._before = RandomState()

    def __exit__(self, *_: object) -> None:
        self._after = RandomState()
        self._drawn |= self._after.differs(self._before)

    @property
    def used(self) -> bool:
        """Whether any were drawn."""
        return bool(self._drawn)

    @property
    def due(self) -> bool:
        """Whether they are those that would be drawn now: nothing else has drawn any of that library since."""
        return not RandomState().differs(self._after) & self._drawn
