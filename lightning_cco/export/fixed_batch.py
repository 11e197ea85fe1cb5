"""Files for engines that compile a graph for sizes that are known: of one sample, unless the caller wants as many as the example has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_cco.export.batch_chunks import MOST_SAMPLES, Samples, left_out_of_the_check
from lightning_cco.export.deployed_forward import Deployed
from lightning_cco.export.engines import Engine
from lightning_cco.export.errors import ExportError

Call = tuple[Tensor, ...]


def refuse_varying(engine: Engine, asked: Mapping[str, Any]) -> None:
    """Refuse options that let axes vary, for an engine of known sizes.

    Args:
        engine: What the file is for.
        asked: The options by name; `None` and `False` ask for nothing.

    Raises:
        CCOError: One of them does; the message names it.
    """
    wanted = [name for name, value in asked.items() if value]
    if engine.fixed_batch and wanted:
        raise ExportError(
            f"{wanted[0]}={asked[wanted[0]]!r} with target_framework: {engine.name}: {engine.fixed_batch}. Leave it out, and the file takes one "
            "sample, or pass dynamic_batch=False, and it takes as many as the example has."
        )


def of_one_sample(
    deployed: Deployed, calls: Sequence[Call], why: str, remade: Callable[[tuple[Any, ...], dict[str, Any]], Deployed]
) -> tuple[Deployed, list[Call], list[str]]:
    """The forward with an example of one sample, where the model takes that.

    Args:
        deployed: The forward, with an example of any number of samples.
        calls: What the file is to be checked on.
        why: Why the size is fixed.
        remade: The same forward with another example.

    Returns:
        That forward; the calls, cut to its size; and what is to be said.
    """
    samples = Samples(deployed, 1)
    pieces, left_out = samples.pieces(calls, MOST_SAMPLES)
    notes = samples.notes or [f"the file takes one sample at once: {why}; dynamic_batch=False keeps the example's number of samples"]
    return remade(*deployed.call(samples.example)), pieces, notes + left_out_of_the_check(left_out, len(calls))
