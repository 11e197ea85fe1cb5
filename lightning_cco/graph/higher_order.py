"""Operators that take functions (`torch.cond`, `scan`, `while_loop`): each is one layer in float, which reads its operands and what its functions read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_cco.compat.dynamo import TAKE_FUNCTIONS
from lightning_cco.graph.containers import tensors_in

IN_FLOAT = "{} runs functions whose calls hooks don't see; torch.where of both branches, or a loop in Python, can be quantized"
"""Why such an operator is left in float, by its name."""


class WatchedBodies(TorchFunctionMode):
    """Makes a call of such an operator, and finds the parameters that its functions read.

    A branch that the example does not take, or a loop that it does not enter, is run in addition: its weights belong to the model as well.

    Attributes:
        read: The parameters, each once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[int, nn.Parameter] = {}

    def call(self, operator: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of the operator."""
        ran: set[int] = set()

        def watched(function: Callable[..., Any]) -> Callable[..., Any]:
            def body(*args: Any, **kwargs: Any) -> Any:
                ran.add(id(function))
                with self:
                    return function(*args, **kwargs)

            return body

        result = operator(*(watched(arg) if _is_function(arg) else arg for arg in args), **kwargs)
        operands = [item for arg in args if isinstance(arg, (list, tuple)) for item in arg]
        for function in args:
            if _is_function(function) and id(function) not in ran:
                self._run_aside(function, operands)
        return result

    def _run_aside(self, function: Callable[..., Any], operands: list[Any]) -> None:
        with torch.no_grad():
            given = [
                operand.clone() if isinstance(operand, Tensor) else operand for operand in operands
            ]  # a body may write to what it is given
            try:
                with self:
                    function(*given)
            except Exception:  # what it computes nobody asked for
                return

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in TAKE_FUNCTIONS:
            return self.call(func, args, kwargs)
        self.read.update((id(tensor), tensor) for _, tensor in tensors_in([args, kwargs]) if isinstance(tensor, nn.Parameter))
        return func(*args, **kwargs)


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, Tensor)
