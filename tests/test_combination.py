"""Every way of training with every kind of model. ``make compatibility`` writes the table of `docs/compatibility.md` from the results."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import compatibility
import pytest
import torch
from combination import BATCH, EPOCHS, FEATURES, MODELS, SAMPLES, train

TESTS = Path(__file__).parent
EXACT = {"compile", "checkpointing", "ema", "resume", "test", "configure_model"}
"""They change how a step is computed or what is done with it, not the step."""
SLOW = {"compile", "ddp"}
COMPILING = pytest.mark.timeout(900)
"""A compile of a quantized model takes three to five times that of the float one (25 s of processor time for the BERT); two processes do it three times."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # the compiler looks at its inputs' gradients
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),  # resumed in another folder
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),  # with configure_model
]


@functools.cache
def reference(model: str) -> dict[str, Any]:
    """Quantized, with no feature."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return train(model, [], Path(folder))


def run(model: str, features: Iterable[str], folder: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What came of training quantized and in float, on each rank."""
    features = list(features)
    if "ddp" not in features:
        return [(train(model, features, folder / "quantized"), train(model, features, folder / "float", quantized=False))]
    command = [sys.executable, "-W", "ignore", str(TESTS / "combination.py"), str(folder), model, *features]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TESTS)
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(torch.load(folder / f"rank{rank}.pt", weights_only=True)) for rank in range(2)]


def check(model: str, features: Iterable[str], folder: Path) -> None:
    features = set(features)
    if model == "LSTM" and "bf16" in features and not lstm_runs_in_bfloat16():
        pytest.skip("PyTorch has no LSTM in bfloat16 on this processor")
    expected = reference(model)
    found = run(model, features, folder)
    samples = SAMPLES - 3 if "partial_batch" in features else SAMPLES
    for quantized, plain in found:
        assert quantized["drift"] == []
        assert quantized["quantized"] == expected["quantized"] != []
        assert quantized["still"] == []  # the quantizers ran in the training step
        assert quantized["dtypes"] == ["torch.float32"]
        assert len(quantized["losses"]) == len(plain["losses"]) == EPOCHS * -(-samples // BATCH)
        # Quantized, but the same training.
        assert quantized["losses"] != pytest.approx(plain["losses"], rel=1e-6)
        assert quantized["losses"] == pytest.approx(plain["losses"], rel=0.2)  # ranges from an untrained batch norm clip a little at first
        if features <= EXACT:
            assert quantized["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        if features <= {*EXACT, "bf16"}:
            assert quantized["losses"] == pytest.approx(expected["losses"], rel=0.05)
        if "tested" in quantized:
            assert quantized["tested"] == pytest.approx(quantized["logged"], rel=1e-5)
            assert quantized["tested"] != pytest.approx(plain["tested"], rel=1e-7)
    if "ddp" in features:
        one, two = (quantized for quantized, _ in found)
        assert one["losses"] != two["losses"]
        assert one["qs"] == two["qs"]
        assert one["ranges"].keys() == two["ranges"].keys()
        assert all(torch.equal(one["ranges"][key], two["ranges"][key]) for key in one["ranges"])


def lstm_runs_in_bfloat16() -> bool:
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            torch.nn.LSTM(4, 4)(torch.zeros(1, 1, 4))
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("feature", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in FEATURES])
def test_cell(model: str, feature: str, tmp_path: Path, record_property: pytest.RecordProperty) -> None:
    record_property("cell", (feature, model))
    check(model, [feature], tmp_path)


@pytest.mark.slow
@COMPILING
@pytest.mark.parametrize("model", MODELS)
def test_all_at_once(model: str, tmp_path: Path, record_property: pytest.RecordProperty) -> None:
    record_property("cell", ("all", model))
    check(model, FEATURES, tmp_path)


QUICK_PAIRS = [pair for pair in itertools.combinations(FEATURES, 2) if not SLOW & set(pair)]
SLOW_PAIRS = list(zip((pair for pair in itertools.combinations(FEATURES, 2) if SLOW & set(pair)), itertools.cycle(MODELS), strict=False))
"""Half a minute each: the kinds of models take turns."""


@pytest.mark.slow
@pytest.mark.parametrize("pair", QUICK_PAIRS, ids="-".join)
@pytest.mark.parametrize("model", MODELS)
def test_pair(model: str, pair: tuple[str, str], tmp_path: Path, record_property: pytest.RecordProperty) -> None:
    record_property("cell", ("pairs", model))
    check(model, pair, tmp_path)


@pytest.mark.slow
@COMPILING
@pytest.mark.parametrize(("pair", "model"), SLOW_PAIRS, ids=["-".join((*pair, model)) for pair, model in SLOW_PAIRS])
def test_pair_with_the_compiler_or_two_processes(
    pair: tuple[str, str], model: str, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    record_property("cell", ("slow_pairs", model))
    check(model, pair, tmp_path)


def test_the_table_in_the_docs_has_every_cell_and_none_that_failed() -> None:
    table = compatibility.read_table(compatibility.PAGE)
    assert set(table) == {(row, model) for row in compatibility.ROWS for model in MODELS}
    assert set(table.values()) == {"✓"}
