"""Custom autograd Functions: their operations are seen, and counted, but what they compute and how it is derived is theirs.

Which calls are made by one is read off the call stack of the thread, so nothing of PyTorch has to be replaced.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import CheckpointFunction

from lightning_cco.compat.autograd import forwards_of_functions, given_to
from lightning_cco.compat.modules import MODULE_CALL
from lightning_cco.graph.call_node import CallNode


@dataclass(eq=False)
class CustomCall:
    """One call of a custom function.

    Attributes:
        name: The function's class.
        node: The module call it was made in.
        operands: Where the tensors that it was given come from.
        number: Its number among the tracer's calls, once somebody reads what it returns.
    """

    name: str
    node: CallNode
    operands: list[Any]
    number: int | None = None


class RunningFunction(NamedTuple):
    """A custom function that runs now.

    Attributes:
        frame: The frame of its ``forward``.
        name: Its class.
        given: What it was called with.
    """

    frame: FrameType
    name: str
    given: tuple[Any, ...]


class RunningFunctions:
    """Tells in which custom function a torch call is made."""

    def __init__(self) -> None:
        self._classes: dict[CodeType, type[torch.autograd.Function] | None] = {}

    def outermost(self) -> RunningFunction | None:
        """The outermost custom function between the torch call now seen and the module that makes it.

        The function of reentrant checkpointing is none: its forward is the user's own, layer by layer.
        """
        found = None
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not MODULE_CALL:
            function = self._class(frame.f_code)
            given = None if function is None else given_to(frame, function)
            if function is not None and given is not None:
                found = RunningFunction(frame, function.__name__, given)
            frame = frame.f_back
        return found

    def _class(self, code: CodeType) -> type[torch.autograd.Function] | None:
        if code not in self._classes:  # a class may be made by the forward itself
            function = forwards_of_functions().get(code)
            self._classes[code] = None if function is None or issubclass(function, CheckpointFunction) else function
        return self._classes[code]
