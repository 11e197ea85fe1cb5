"""``sensitivity.csv``: every measured layer of every epoch, appended, so that an epoch costs the same whatever came before it."""

from __future__ import annotations

import csv
import io
import os
import stat
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning_cco.errors import CCOWarning
from lightning_cco.files import real_file, write_file
from lightning_cco.names import csv_cell, printable
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.sensitivity import SensitivityReport

_FIGURES = ("qs", "relative", "sqnr_db", "varying_sqnr_db")
HEADER = ["epoch", "layer", "module", *_FIGURES, *(f"accumulated_{figure}" for figure in _FIGURES)]


class SensitivityCsv:
    """The table of one run.

    Args:
        path: The file.
        earlier: The file that a resumed run goes on from, most often the same one; `None`: the table starts anew.
    """

    header: Sequence[str] = HEADER

    def __init__(self, path: Path, earlier: Path | None = None) -> None:
        self.path, self.earlier = path, earlier
        self._seen: tuple[int, int, int] | None = None  # device, inode and size that this run left
        self._last = -1
        self._text: list[tuple[int, str]] = []  # epoch and rows, should another run take the file

    def write(self, epoch: int, report: SensitivityReport, plan: QuantizationPlan) -> None:
        """Add an epoch. One that is run again takes the place of what came from it on.

        Raises:
            OSError: The file can't be written; it is then as it was.
        """
        self.write_rows(epoch, _rows(epoch, report, plan))

    def write_rows(self, epoch: int, cells: Iterable[Sequence[str]]) -> None:
        """Add an epoch's rows, which begin with its number.

        Raises:
            OSError: The file can't be written; it is then as it was.
        """
        rows = _as_text(cells)
        found = _identity(self.path)
        if self._seen is not None and found is not None and found != self._seen:
            self._move()
            found = None
        if self._seen is None or found is None or epoch <= self._last:
            earlier = self._kept(epoch) if self._seen is not None else _as_text([self.header, *_before(self.earlier, epoch, self.header)])
            self._text = [(-1, earlier)]
            write_file(self.path, earlier + rows)
        else:
            _append(self.path, rows.encode())
        self._text.append((epoch, rows))
        self._seen, self._last = _identity(self.path), epoch

    def _kept(self, epoch: int) -> str:
        """What this run has written of the epochs before."""
        if epoch > self._last:
            return "".join(text for _, text in self._text)
        (_, start), *later = self._text
        kept = [row for row in csv.reader(io.StringIO(start, newline="")) if not row[0].isdigit() or int(row[0]) < epoch]
        return _as_text(kept) + "".join(text for number, text in later if number < epoch)

    def _move(self) -> None:
        """Leave the file to the other run that writes into it; all rows of this one go into a file of its own."""
        taken, number = self.path, 2
        while (own := taken.with_name(f"{taken.stem}_{number}{taken.suffix}")).exists():
            number += 1
        self.path = own
        warnings.warn(
            f"lightning_cco: another run writes into '{printable(taken)}', so this one goes on in '{printable(own.name)}'. "
            "Give each run a monitoring_settings.output_dir of its own.",
            CCOWarning,
            stacklevel=3,
        )


def _rows(epoch: int, report: SensitivityReport, plan: QuantizationPlan) -> Iterable[Sequence[str]]:
    for name in plan.graph.names:
        local, accumulated = report.local.get(name), report.accumulated.get(name)
        if local is None and accumulated is None:
            continue
        cells = [str(epoch), csv_cell(name), csv_cell(plan.graph[name].path)]
        for entry in (local, accumulated):
            cells += [f"{getattr(entry, figure):.9g}" if entry else "" for figure in _FIGURES]
        yield cells


def _as_text(rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()


def _before(path: Path | None, epoch: int, header: Sequence[str] = HEADER) -> list[list[str]]:
    """The rows of a table before an epoch; none if there is no such table. A torn last row is left out."""
    if path is None or not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.reader(file)
        if next(rows, None) != list(header):
            return []
        return [row for row in rows if len(row) == len(header) and row[0].isdigit() and int(row[0]) < epoch]


def _append(path: Path, data: bytes) -> None:
    """All or nothing, and in one piece also where another process appends."""
    with open(real_file(path), "ab", buffering=0) as file:
        start = file.seek(0, os.SEEK_END)
        try:
            written = file.write(data)
            if written < len(data):
                file.write(data[written:])  # says why, if the disk is full
        except OSError:
            file.truncate(start)
            raise


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size) if stat.S_ISREG(found.st_mode) else None
