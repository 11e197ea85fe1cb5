"""One way in which a group of layers can run."""

from __future__ import annotations

from dataclasses import dataclass

FLOAT_BITS = 32
FLOAT, WEIGHT_ONLY, INTEGER = "float", "weight-only", "INT8"


@dataclass(frozen=True)
class Option:
    """One way in which a group of layers can run.

    Attributes:
        form: In float, with integer weights alone, or in integers.
        weights: Bits of the weights; 32 in float.
        activations: Bits of what it reads; 32 where that is not rounded.
        rise: Expected rise of the loss by its weights.
        bytes: What its weights take in the file.
        bits: Bits of all weights together.
        operations: Bits of both operands, multiplied, of all multiplications.
    """

    form: str
    weights: int
    activations: int
    rise: float
    bytes: float
    bits: float
    operations: float
