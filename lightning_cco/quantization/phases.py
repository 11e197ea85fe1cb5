"""What the runtime can do at a planned call."""

from __future__ import annotations

from enum import Enum


class Phase(Enum):
    """What is done at each planned call."""

    QUANTIZE = "quantize"
    PASS = "pass"
    """Compute in float."""
    OBSERVE = "observe"
    """Float, and the quantizers look at what passes."""
    MEASURE_LOCAL = "measure_local"
    """Float, and each layer once more quantized on the same input."""
    RECORD_FLOAT = "record_float"
    RECORD_QUANTIZED = "record_quantized"
    CORRECT = "correct"
    """As in QUANTIZE, with functions that the recorder puts in the place of a layer's, for bias correction."""
    DELEGATE = "delegate"
    """The recorder makes the call."""
