"""The table of ONNX operators that compute no new values: each in one row, with how it treats what it reads and what engines do around it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MovingOperator:
    """One operator whose result holds values that it has read, sizes, masks, or the same values in another type.

    Attributes:
        name: The ONNX operator, or the one of ONNX Runtime's optimized graphs.
        reshapes: Whether it only says anew how values lie, and engines move a quantize or dequantize operator past it themselves.
        picks: Whether it only says which values go where, and engines have it for integers as well.
        passed: Whether ONNX Runtime moves conversions past it where it looks for float weights to round.
        counts: Whether its result is sizes or indices, and so integers.
        converts: Whether it changes the type or the place of values.
        draws: Whether it draws random numbers.
    """

    name: str
    reshapes: bool = False
    picks: bool = False
    passed: bool = False
    counts: bool = False
    converts: bool = False
    draws: bool = False


_ROWS = (
    # Say anew how values lie.
    *(MovingOperator(name, reshapes=True, passed=True) for name in ("Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze")),
    MovingOperator("Identity", passed=True),
    MovingOperator("DepthToSpace", picks=True, passed=True),
    MovingOperator("SpaceToDepth", passed=True),
    MovingOperator("ReorderInput"),
    MovingOperator("ReorderOutput"),
    # Pick values, or put them elsewhere.
    MovingOperator("Gather", picks=True, passed=True),
    MovingOperator("Slice", picks=True, passed=True),
    *(MovingOperator(name, picks=True) for name in ("GatherElements", "GatherND", "Split")),
    *(
        MovingOperator(name)
        for name in ("Compress", "GatherBlockQuantized", "ReverseSequence", "ScatterElements", "ScatterND", "Trilu", "Where")
    ),
    # Repeat values, or make constant ones.
    MovingOperator("Expand", picks=True, passed=True),
    MovingOperator("Tile", picks=True),
    MovingOperator("Pad", passed=True),
    *(MovingOperator(name) for name in ("Constant", "ConstantOfShape", "OneHot", "Range")),
    # Draw random numbers.
    *(
        MovingOperator(name, draws=True)
        for name in ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
    ),
    # Sizes and indices.
    *(MovingOperator(name, counts=True) for name in ("ArgMax", "ArgMin", "NonZero", "Shape", "Size")),
    # The same values as another type, or elsewhere.
    *(
        MovingOperator(name, converts=True)
        for name in ("CastLike", "DequantizeLinear", "DynamicQuantizeLinear", "MemcpyFromHost", "MemcpyToHost", "QuantizeLinear")
    ),
    MovingOperator("Cast", passed=True, converts=True),
    # What is inside of them computes.
    *(MovingOperator(name) for name in ("If", "Loop", "Scan")),
    MovingOperator("Dropout", passed=True),
)

MOVING = {row.name: row for row in _ROWS}
"""Row by operator."""
RESHAPES = frozenset(row.name for row in _ROWS if row.reshapes)
PICKS = frozenset(row.name for row in _ROWS if row.picks)
PASSED = frozenset(row.name for row in _ROWS if row.passed) | {"MaxPool"}
"""A maximum of rounded values is one of them, but an engine computes it."""
COUNTS = frozenset(row.name for row in _ROWS if row.counts)
DRAWS = frozenset(row.name for row in _ROWS if row.draws)
