"""Marks which private APIs a test tries."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from lightning_cco.compat.table import BY_NAME

F = TypeVar("F", bound=Callable[..., None])


def tries(*names: str) -> Callable[[F], F]:
    """The test fails where one of these rows of `compat.table` does not do what we take it to do."""
    assert set(names) <= set(BY_NAME), set(names) - set(BY_NAME)
    return lambda test: test
