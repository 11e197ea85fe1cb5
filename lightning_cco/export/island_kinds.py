"""A layer that an engine computes in float (a float island), and why."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class IslandKind(str, Enum):
    """Why an engine computes a node in float. Each equals its word, which the report's JSON has."""

    PLANNED = "planned"
    """The plan leaves the layer in float."""
    NO_LAYER = "no layer"
    """It belongs to no layer of the model."""
    LOOKUP = "lookup"
    """It dequantizes rows that were looked up as integers."""
    NO_RANGE = "no range"
    """A tensor of the layer has no range, since nothing came there in calibration and training."""
    FOUR_BITS = "4 bits"
    """Its weights are stored in 4 bits, for which the engine has no INT8 product."""
    IN_ORT_ALONE = "in ONNX Runtime alone"
    """It is planned in INT8 for another engine than ONNX Runtime, in which the file is checked."""
    UNPLANNED = "unplanned"
    """It is planned in INT8, but the engine that the file is for computes it in float."""


@dataclass(frozen=True)
class FloatIsland:
    """A node that the engine computes in float, and the layers that cause it.

    Attributes:
        operator: What the node computes.
        layers: The layers that it may come from.
        reason: Why they are in float: the plan's reason, or the engine; a text for people.
        kind: The same as a word.
    """

    operator: str
    layers: tuple[str, ...]
    reason: str
    kind: IslandKind

    @property
    def unplanned(self) -> bool:
        """Whether the plan has the layer in INT8."""
        return self.kind is IslandKind.UNPLANNED
