"""Custom autograd Functions: their operations are seen, and counted, but what they compute and how it is derived is theirs.

Which calls are made by one is read off the call stack of the thread, so nothing of PyTorch has to be replaced.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch.utils.checkpoint import CheckpointFunction

from lightning_cco.compat.autograd import FUNCTION_APPLY, applied
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


def running_function() -> FrameType | None:
    """The outermost custom function between the torch call now seen and the module that makes it, as a frame of ``Function.apply``.

    The function of reentrant checkpointing is none: its forward is the user's own, layer by layer.
    """
    found = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not MODULE_CALL:
        if frame.f_code is FUNCTION_APPLY and applied(frame)[0] is not CheckpointFunction:
            found = frame
        frame = frame.f_back
    return found
