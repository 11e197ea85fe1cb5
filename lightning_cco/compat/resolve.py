"""How the names of this package find what is private to others, on any version.

What is asked at each torch call must not cost a further Python call: names are bound once, at import, to the functions themselves.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

from lightning_cco.compat.table import BY_NAME, TESTED
from lightning_cco.errors import CCOError

_missing: list[str] = []


def find(name: str) -> Any:
    """What has this dotted name: an attribute of a module, or of something in it.

    Raises:
        AttributeError: The installed version has no such thing.
    """
    parts = name.split(".")
    for size in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:size]))
        except ImportError:
            continue
        for part in parts[size:]:
            found = getattr(found, part)
        return found
    raise AttributeError(name)


def needed(name: str) -> Any:
    """A private API that has no substitute.

    Where it is missing, `refuse_missing` says so before a model is hooked; what is returned here raises the same error when it is called.
    """
    try:
        return find(name)
    except AttributeError:
        _missing.append(name)

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise CCOError(missing_message([name]))

        return refuse


def or_else(name: str, otherwise: Any) -> Any:
    """A private API, or what does the same without it: slower, or with a figure less, never with another result."""
    try:
        return find(name)
    except AttributeError:
        return otherwise


def refuse_missing() -> None:
    """Raise if the installed versions lack something that quantization needs.

    Raises:
        CCOError: Names what is missing, what it is for, and the versions that have it.
    """
    if _missing:
        raise CCOError(missing_message(_missing))


def missing_message(names: list[str]) -> str:
    """What is said where private APIs are missing.

    >>> print(missing_message(["torch._C._current_graph_task_id"]).partition(" (installed")[0])
    expected torch._C._current_graph_task_id (tells a backward from a forward)
    """
    parts = [f"{name} ({BY_NAME[name].purpose})" for name in names]
    packages = dict.fromkeys(BY_NAME[name].package for name in names)
    tested = "; ".join(f"installed {package} {_version(package)}, tested {' and '.join(TESTED[package])}" for package in packages)
    return (
        f"expected {', '.join(parts)} ({tested}). The installed version has no such thing, and nothing else tells the same. "
        f"Install a tested one: pip install {' '.join(repr(f'{package}=={TESTED[package][-1]}') for package in packages)}."
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
