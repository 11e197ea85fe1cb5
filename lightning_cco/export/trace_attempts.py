"""The first of several attempts to trace a forward that works: with all axes that may vary, with fewer of them, with none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from lightning_cco.export.deployed_forward import Deployed
from lightning_cco.export.dynamic_axes import Axes
from lightning_cco.export.errors import SizesDoNotVary
from lightning_cco.export.failures import kind_of, untraceable
from lightning_cco.export.qdq_emitter import Emitter
from lightning_cco.names import module_of

T = TypeVar("T")


def first_traced(attempts: Iterable[Axes], trace: Callable[[Axes], T], explain: Callable[[Exception], str]) -> tuple[T, Axes]:
    """What the first attempt gives that works, and its axes.

    Exporters make attempts of their own when one fails, which would lose the quantization.

    Args:
        attempts: Which axes vary; the best first.
        trace: Traces, with whatever else may fail of an attempt.
        explain: The message for the error of the first attempt, where all fail.

    Raises:
        SizesDoNotVary: Raised by ``trace``, for the caller, who has others.
        ExportError: No attempt works.
    """
    failure: Exception | None = None
    for axes in attempts:
        try:
            return trace(axes), axes
        except SizesDoNotVary:
            raise
        except Exception as error:
            failure = failure or error
    assert failure is not None
    raise kind_of(failure)(explain(failure)) from failure


def first_emitted(deployed: Deployed, emitter: Emitter, attempts: Iterable[Axes], trace: Callable[[Axes], T]) -> tuple[T, Axes]:
    """The same with quantize and dequantize operators.

    Args:
        deployed: The forward, tensors in and out.
        emitter: Collects the integers of an eager forward before each attempt, then writes them in its trace.
        attempts: Which axes vary; the best first.
        trace: Traces, with whatever else may fail of an attempt.

    Raises:
        SizesDoNotVary: Raised by ``trace``, for the caller, who has others.
        ExportError: No attempt works; with the layer that the last trace came to.
    """

    def collected() -> Iterator[Axes]:
        for axes in attempts:
            with emitter.collecting():
                deployed(*axes.tensors)
            yield axes

    def explain(failure: Exception) -> str:
        reached, graph = emitter.reached, emitter.quantized.graph
        where = f" after layer '{reached}' ({module_of(graph[reached].path)})" if reached else ""
        return untraceable(emitter.quantized.model, where, failure, graph, deployed.names)

    return first_traced(collected(), trace, explain)
