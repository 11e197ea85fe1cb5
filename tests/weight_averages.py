"""Callbacks of Lightning that average weights. A test that needs one which the installed version does not have is skipped."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import Callback, callbacks


def averaging(name: str, **options: Any) -> Callback:
    """The callback of this name."""
    if not hasattr(callbacks, name):
        pytest.skip(f"this Lightning has no {name}")
    made: Callback = getattr(callbacks, name)(**options)
    return made
