"""What the emitter writes where fake-quantization would be, in the words of the file that is written."""

from __future__ import annotations

from lightning_cco.export.dialects.dialect import Dialect, Format
from lightning_cco.export.dialects.onnx_operators import OnnxDialect
from lightning_cco.export.dialects.pt2e_operators import Pt2eDialect

__all__ = ["Dialect", "Format", "OnnxDialect", "Pt2eDialect"]
