"""Operators: `torch.ops.aten.conv2d` and its overloads, as exported programs call them."""

from __future__ import annotations

from torch._ops import OpOverload, OpOverloadPacket

__all__ = ["OpOverload", "OpOverloadPacket"]
