"""The first of several ways of tracing a forward that works."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from lightning_cco.export.deployed_forward import Deployed
from lightning_cco.export.dynamic_axes import Axes
from lightning_cco.export.errors import SizesDoNotVary
from lightning_cco.export.failures import kind_of, untraceable
from lightning_cco.export.qdq_emitter import Emitter

T = TypeVar("T")


def first_way(deployed: Deployed, emitter: Emitter, ways: Iterable[Axes], made: Callable[[Axes], T]) -> tuple[T, Axes]:
    """What the first way of tracing gives that works, and its axes.

    By themselves exporters try other ways when one fails, which would lose the quantization.

    Args:
        deployed: The forward, tensors in and out.
        emitter: Collects the integers of an eager forward of each way, then writes them in a trace.
        ways: Which axes vary; the best first.
        made: Traces and whatever else belongs to a way, in one.

    Raises:
        SizesDoNotVary: Raised by ``made``, for the caller, who has others.
        CCOError: No way works; of the first one, with the layer that its trace came to.
    """
    failure: Exception | None = None
    for axes in ways:
        with emitter.collecting():
            deployed(*axes.tensors)
        try:
            return made(axes), axes
        except SizesDoNotVary:
            raise
        except Exception as error:
            failure = failure or error
    assert failure is not None
    reached, graph = emitter.reached, emitter.quantized.graph
    where = f" after layer '{reached}' (module '{graph[reached].path}')" if reached else ""
    raise kind_of(failure)(untraceable(emitter.quantized.model, where, failure, graph, deployed.names)) from failure
