"""What `import lightning_cco` loads, and what it offers."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_cco

_LISTING = "import sys; import {first}; before = set(sys.modules); import {second}; print(*sorted({{n.split('.')[0] for n in set(sys.modules) - before}}))"


def loaded(first: str, second: str) -> set[str]:
    """Top-level packages that an import adds in a fresh process to those of another one."""
    code = _LISTING.format(first=first, second=second)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


def test_the_import_loads_nothing_heavy_that_training_does_not() -> None:
    """Beside Lightning itself: readers of recipes and of pictures, and the standard library."""
    added = loaded("lightning.pytorch", "lightning_cco")
    expected = {"lightning_cco", "omegaconf", "antlr4", "yaml", "_yaml", "pydot", "pyparsing", "PIL", "attr"}
    assert added - expected - set(sys.stdlib_module_names) == set()


def test_every_public_name_is_there_and_others_are_an_error() -> None:
    assert all(hasattr(lightning_cco, name) for name in lightning_cco.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        lightning_cco.no_such_name  # type: ignore[attr-defined]  # noqa: B018


def test_the_version_is_the_packages() -> None:
    assert lightning_cco.__version__ == importlib.metadata.version("lightning-cco")


def test_the_package_is_marked_as_typed() -> None:
    assert Path(lightning_cco.__file__).with_name("py.typed").is_file()
