"""Operators: `torch.ops.aten.conv2d` and its overloads, as exported programs call them."""

from __future__ import annotations

from torch._ops import OpOverload, OpOverloadPacket

from lightning_cco.compat.resolve import or_else

check_of_inverses = or_else("torch.ops.aten._linalg_check_errors.default", None)
"""The operator in traces that raises where a matrix had no inverse.

Private API: ``torch.ops.aten._linalg_check_errors``. Without it: `None`, and ONNX files of models that invert matrices are refused by name.
"""

__all__ = ["OpOverload", "OpOverloadPacket", "check_of_inverses"]
