"""One torch call as the capture records it: what it read, what it multiplied by, and its place in the code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_cco.graph.call_node import Called, CallNode
from lightning_cco.graph.layer import Layer
from lightning_cco.graph.ops import Op

ArgPath = tuple[Any, ...]
"""Way to a tensor in a call: position or keyword first, then indices into nested lists."""


@dataclass(frozen=True)
class Read:
    """A tensor that a call takes from another layer."""

    slot: ArgPath
    source: int
    output: int
    quantizable: bool


@dataclass(frozen=True)
class Weight:
    """A parameter, or a tensor computed from parameters alone, that a call multiplies by or adds.

    Attributes:
        slot: Its place among the arguments of the call.
        parameters: Dotted names of the parameters it comes from; empty for a constant.
        axis: Axis that counts output channels; `None`: one scale for the whole tensor.
        shape: Its shape.
        cut_from: Dotted name of the one tensor of a module that it is, or is cut from, if it is no weight of a product; `None`: there is none.
    """

    slot: ArgPath
    parameters: tuple[str, ...]
    axis: int | None
    shape: tuple[int, ...] = ()
    cut_from: str | None = None


@dataclass
class Call:
    """One torch call, as the tracer saw it.

    Attributes:
        layer: The layer, its name still empty.
        node: The frame it ran in.
        function: Name of the torch function, spelled as called.
        op: Its row in the table of operations.
        index: Which call of this operation within the frame.
        training: Whether the module that made the call was in training mode.
        in_place: Whether the result is the first argument itself.
        visible: Whether a function mode sees it again at run time (inputs, outputs and custom functions are not seen).
        position: Place of the call in the user's code, to distinguish two branches; -1 in modules of PyTorch itself.
        after: The module that the frame has called last.
    """

    layer: Layer
    node: CallNode
    function: str
    op: Op
    index: int
    training: bool = False
    reads: list[Read] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    in_place: bool = False
    visible: bool = True
    position: int = -1
    after: Called | None = None
