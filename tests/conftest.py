"""Shared set-up of the tests."""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry

from lightning_cco.compat.torch_modes import function_mode_count
from lightning_cco.export import onnx_file
from lightning_cco.export.report import ExportReport

sys.path.insert(0, str(Path(__file__).parent))

hypothesis.settings.register_profile("same", derandomize=True)  # what fails once fails again, here and elsewhere
hypothesis.settings.load_profile("same")

_VARYING = frozenset(
    {
        "test_dynamic_sizes.py",
        "test_export.py",
        "test_unsuitable_batches.py",
        "test_export_local_check.py",
        "test_export_recurrent.py",
        "test_interpolate_layers.py",
        "test_readme.py",
        "test_slices_of_parameters.py",
    }
)
"""Files whose exports try other sizes in `make test` too; elsewhere it would double their time."""
assert {path.name for path in Path(__file__).parent.rglob("test_*.py")} >= _VARYING, "a test file of _VARYING was renamed"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of ``slow_tests.txt``."""
    lines = (Path(__file__).parent / "slow_tests.txt").read_text(encoding="utf-8").splitlines()
    slow = {line for line in lines if line and not line.startswith("#")}
    for item in items:
        if item.nodeid in slow:
            item.add_marker("slow")


@pytest.fixture(autouse=True, scope="session")
def _one_registry_of_operators() -> None:
    """The exporter reads the source of its 500 operators at each export, half of the time of a small model: once a process is enough here."""
    fresh = functools.cache(ONNXRegistry.from_torchlib)

    def cached(*arguments: Any, **options: Any) -> ONNXRegistry:
        registry = copy.copy(fresh(*arguments, **options))
        registry.functions = {target: list(decompositions) for target, decompositions in registry.functions.items()}
        return registry

    ONNXRegistry.from_torchlib = staticmethod(cached)  # type: ignore[assignment, method-assign]


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """Lightning leaves ``LOCAL_RANK`` behind when it has trained with DDP: a later test that starts two processes would start one, which waits for ever."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _no_mode_is_left() -> Iterator[None]:
    """A function mode that a test leaves on the stack sees every torch call of the tests after it."""
    before = function_mode_count()
    yield
    assert function_mode_count() == before


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _sizes_of_the_example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying sizes that vary takes as long as the rest of an export: `make test` does it in the tests of them and of whole models, `make test-all` in all."""
    fast = request.config.getoption("markexpr") == "not slow"
    if fast and Path(request.node.path).name not in _VARYING:
        original = onnx_file.sizes_to_vary
        monkeypatch.setattr(
            onnx_file,
            "sizes_to_vary",
            lambda quantized, deployed, batch, wanted, check: original(quantized, deployed, batch, wanted or False, check),
        )


@pytest.fixture(autouse=True)
def _int8_as_planned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file that any test exports for ONNX Runtime, whatever writes it, has a layer in float that is planned in INT8, or the other way round."""
    check = onnx_file.check_file

    def checked(*args: Any, **options: Any) -> Any:
        result = check(*args, **options)
        (report,) = (value for value in (*args, *options.values()) if isinstance(value, ExportReport))
        assert request.node.get_closest_marker("computed_in_float") or not [island for island in report.float_islands if island.unplanned]
        assert not report.unasked
        return result

    monkeypatch.setattr(onnx_file, "check_file", checked)


@pytest.fixture(autouse=True)
def _same_numbers_in_examples(request: pytest.FixtureRequest) -> None:
    """Examples of docstrings draw numbers without a seed: of few samples a ReLU may give zeros alone, which is a warning."""
    if isinstance(request.node, pytest.DoctestItem):
        torch.manual_seed(0)
