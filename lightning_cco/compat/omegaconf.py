"""The root of an OmegaConf configuration, which its interpolations refer to."""

from __future__ import annotations

from typing import Any


def root_of(config: Any) -> Any:
    """The configuration that this one is a part of, or itself.

    Private API: ``Container._get_root``. Without it: `AttributeError` while the recipe is read, since interpolations that grow without end would go unchecked.
    """
    return config._get_root()
