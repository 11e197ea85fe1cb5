"""What `torch.compile` is doing just now."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from lightning_cco.compat.resolve import or_else

_NOT_THE_USERS = tuple(os.path.dirname(os.path.abspath(path)) + os.sep for path in (torch.__file__, os.path.dirname(__file__)))


def graph_being_traced() -> Any:
    """The output graph of the code that is traced now; it has the backend as ``compiler_fn``. `None` where it can't be had.

    Private API: ``torch._dynamo.symbolic_convert.InstructionTranslator.current_tx().output``. Without it: compiled graphs run under our function mode, which is
    asked about each of their operations (slower).
    """
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        output = InstructionTranslator.current_tx().output
        return output if hasattr(output, "compiler_fn") else None
    except (ImportError, AttributeError):
        return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def traced_line() -> str:
    """Where in the user's code the torch call is that is traced now, as ``file:line``, outside of PyTorch and of this package; empty where it can't be had.

    Private API: ``torch._guards.TracingContext.extract_stack``. Without it: compiled calls of one operation within one module are told apart by their order
    alone.
    """
    try:
        from torch._guards import TracingContext

        stack = TracingContext.extract_stack()
    except (ImportError, AttributeError):
        return ""
    users = (entry for entry in reversed(stack) if not entry.filename.startswith(_NOT_THE_USERS))
    return next((f"{entry.filename}:{entry.lineno}" for entry in users), "")


TAKE_FUNCTIONS = frozenset({"cond", "while_loop", "scan", "associative_scan", "map", "map_impl", "flex_attention", "invoke_subgraph"})
"""Names of operators that take functions. Without one of them: what it runs is not seen, and named as unseen."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def traces_a_body() -> bool:
    """Whether what is traced now is the body of an operator that takes functions (`torch.cond`), which may write to nothing outside of it.

    Private API: ``output.current_tracer`` of `graph_being_traced`, its ``parent`` and ``source_target``. Without it: such an operator around modules of a
    quantized model ends with the compiler's own error.
    """
    tracer = getattr(graph_being_traced(), "current_tracer", None)
    while tracer is not None:
        if getattr(getattr(tracer, "source_target", None), "__name__", "") in TAKE_FUNCTIONS:
            return True
        tracer = getattr(tracer, "parent", None)
    return False


without_side_effect_checks: Callable[..., Any] | None = or_else(
    "torch._dynamo.utils._disable_side_effect_safety_checks_for_current_subtracer", None
)
"""Calls a function in a compiled checkpoint, whose side effects the compiler would leave its graph for. Without it: it leaves it (slower)."""
