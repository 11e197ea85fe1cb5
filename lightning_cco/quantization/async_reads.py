"""Values that come from a device without anybody waiting for it: asked for in one step, read in the next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LateRead:
    """A value on its way to the host. Copies of whatever holds it have none.

    Args:
        value: On any device.
    """

    def __init__(self, value: Tensor) -> None:
        self._here = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=value.is_cuda)
        self._here.copy_(value, non_blocking=True)
        self._event = torch.cuda.current_stream(value.device).record_event() if value.is_cuda else None

    def value(self) -> Tensor:
        """The value, on the CPU. Waits if the device is not yet past the place where it was asked for, so that all processes read it in the same step."""
        if self._event is not None:
            self._event.synchronize()
        return self._here

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()
