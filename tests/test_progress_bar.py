"""The calibration's progress bar is of the Trainer's kind, hands on every batch, and stands in the way of no other."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning_modules import Classifier, batches, make_trainer

import lightning_cco as cc
from lightning_cco.progress import with_progress

pytest.importorskip("rich", reason="Lightning shows its own bars by tqdm then")
from rich import get_console
from rich.console import Console
from rich.progress import Progress


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal would show of Rich."""
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=80)
    monkeypatch.setattr("rich._console", console)
    return shown


def trainer_with(bar: Any, rank: bool = True) -> Any:
    return SimpleNamespace(progress_bar_callback=bar, is_global_zero=rank)


@pytest.mark.parametrize("bar", [None, TQDMProgressBar(), RichProgressBar()])
def test_every_batch_is_handed_on(bar: Any, terminal: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(with_progress(trainer_with(bar), iter(range(5)), 5)) == list(range(5))
    assert ("Calibrating" in terminal.getvalue()) == isinstance(bar, RichProgressBar)
    assert ("Calibrating" in capsys.readouterr().err) == isinstance(bar, TQDMProgressBar)


def test_beside_a_display_that_runs(terminal: io.StringIO) -> None:
    with Progress() as running:
        running.add_task("Training", total=1)
        assert list(with_progress(trainer_with(RichProgressBar()), iter(range(3)), 3)) == [0, 1, 2]
        assert running.live.is_started


def test_other_ranks_show_none(terminal: io.StringIO) -> None:
    assert list(with_progress(trainer_with(RichProgressBar(), rank=False), iter(range(3)), 3)) == [0, 1, 2]
    assert terminal.getvalue() == ""


def test_a_calibration_that_fails_ends_the_display(terminal: io.StringIO) -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(with_progress(trainer_with(RichProgressBar()), failing(), 3))
    assert terminal.getvalue().count("Calibrating") > 0
    assert not getattr(get_console(), "_live_stack", [])


def test_a_training_with_it(terminal: io.StringIO, tmp_path: Path) -> None:
    """Beside Lightning's own bars, which stand where they stood."""
    cco = cc.CCOCallback({"training_settings": {"stats_steps": 2}, "monitoring_settings": {"draw_graph": False}})
    bar = RichProgressBar(console_kwargs={"file": terminal, "force_terminal": True, "width": 80})
    trainer = make_trainer(tmp_path, cco, bar, enable_progress_bar=True, max_epochs=1)
    trainer.fit(Classifier(), batches())
    assert "Calibrating" in terminal.getvalue()
    assert "Epoch 0" in terminal.getvalue()
