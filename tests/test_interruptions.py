"""A run that is interrupted in the middle of an epoch goes on as if it had not been."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
STEP = 4  # of eight in the first epoch


def run(folder: Path, how: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "ignore", str(TESTS / "interrupted.py"), str(folder), how, str(STEP)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=TESTS, timeout=200)


def losses(folder: Path) -> list[tuple[int, float]]:
    return [tuple(json.loads(line)) for line in (folder / "losses.txt").read_text().splitlines()]


@pytest.mark.slow
def test_the_losses_after_an_interruption_are_those_of_a_run_without(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", "none")
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert "drift: []" in whole.stdout
    expected = losses(tmp_path / "whole")
    assert [step for step, _ in expected] == list(range(1, 17))
    for how in ("ctrl_c", "sigterm", "kill"):
        broken = run(tmp_path / how, how)
        assert "drift" not in broken.stdout
        if how == "kill":
            assert broken.returncode == -signal.SIGKILL
        before = losses(tmp_path / how)
        assert before == [pytest.approx(pair, rel=1e-5) for pair in expected[: len(before)]], how
        # SIGTERM lets the batch come to its end.
        assert len(before) == (STEP + 1 if how == "sigterm" else STEP)
        assert ("interrupted.ckpt" in {path.name for path in (tmp_path / how).glob("*.ckpt")}) == (how == "sigterm")

        resumed = run(tmp_path / how, "none")
        assert resumed.returncode == 0, resumed.stderr[-3000:]
        assert "drift: []" in resumed.stdout
        after = losses(tmp_path / how)[len(before) :]
        # What came since the last checkpoint is done again.
        assert after[0][0] == (len(before) + 1 if how == "sigterm" else 4)
        assert after == [pytest.approx(pair, rel=1e-4) for pair in expected[after[0][0] - 1 :]], how
