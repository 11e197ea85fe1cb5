"""What a run says in the log."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_info

from lightning_cco.names import printable


def say(text: str) -> None:
    """Log lines, in the first process; what does not print must not reach a terminal."""
    rank_zero_info("\n".join(printable(line) for line in text.split("\n")))
