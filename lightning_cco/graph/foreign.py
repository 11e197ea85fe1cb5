"""Calls that are not the model's own: those of compiled graphs, and of the machinery that moves parameters between processes."""

from __future__ import annotations

import sys
from types import CodeType, FrameType

_LOOK_FURTHER = ("torch.overrides", "torch.nn.functional", "torch.functional", "torch._tensor", "torch._jit_internal", "torch._ops")
_MACHINERY = (
    "torch._dynamo",
    "torch._inductor",
    "torch._functorch",
    "torch._subclasses",
    "torch.fx",
    "torch._higher_order_ops",
    "torch._decomp",
    "torch.distributed",  # fully sharded parameters are put together by hooks, inside of the frame of their module
)
_origins: dict[CodeType, bool | None] = {}


def is_foreign() -> bool:
    """Whether the torch call now seen comes from a graph that was compiled, from the compiler, or from the machinery of distributed training.

    A module compiled inside an eager one, and every ``torch.compile(model)`` (whose own hooks run eagerly), runs its graph while our mode is active.
    What is in the graph is quantized already: it must be neither quantized again nor counted.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code not in _origins:
            module = frame.f_globals.get("__name__", "")
            foreign = module.startswith(_MACHINERY) or code.co_filename.startswith("<eval_with_key>") or "torchinductor" in code.co_filename
            _origins[code] = True if foreign else None if module in _LOOK_FURTHER else False
        origin = _origins[code]
        if origin is not None:
            return origin
        frame = frame.f_back
    return False
