"""Tables: printed, and written into their place in ``RESULTS.md``."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "RESULTS.md"


@dataclass(frozen=True)
class Table:
    """The answer to one question.

    Attributes:
        key: Names the table's place in the results.
        question: Its heading.
        header: Titles of the columns.
        rows: As many cells each.
        notes: What to know when reading it.
    """

    key: str
    question: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        parts = [f"### {self.question}", markdown(self.header, self.rows), *self.notes]
        return "\n\n".join(parts)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A command line with what all benchmarks take."""
    warnings.simplefilter("ignore")
    arguments = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument(
        "--write", action="store_true", help="also put the tables into their page (benchmarks/RESULTS.md, docs/performance.md)"
    )
    return arguments


def publish(table: Table, options: argparse.Namespace, page: Path = RESULTS) -> None:
    """Print a table, and write it into a page if asked to."""
    print(f"\n{table}\n\n{measured_on(options.threads)}", flush=True)
    if options.write:
        page.write_text(placed(page.read_text(), table.key, f"{table}\n\n{measured_on(options.threads)}"))


def placed(text: str, key: str, section: str) -> str:
    r"""The text with what stands between the marks of ``key`` replaced; at the end, with new marks, if there are none yet.

    >>> placed("a\n<!-- k -->\nold\n<!-- /k -->\nb", "k", "new")
    'a\n<!-- k -->\nnew\n<!-- /k -->\nb'
    """
    start, end = f"<!-- {key} -->", f"<!-- /{key} -->"
    block = f"{start}\n{section}\n{end}"
    found = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if found.search(text):
        return found.sub(lambda _: block, text, count=1)
    return f"{text.rstrip()}\n\n{block}\n"


def measured_on(threads: int) -> str:
    """Machine and versions in a line."""
    return f"*{processor()}, {threads} threads; torch {torch.__version__}, Python {platform.python_version()}, {version('lightning-cco')}*"


def processor() -> str:
    """What the processor calls itself (Linux), with its family and model, for virtual machines hide the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    named = fields.get("model name", platform.machine())
    return f"{named} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def version(package: str) -> str:
    """``name version``, or the name alone if it runs from its source."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package
