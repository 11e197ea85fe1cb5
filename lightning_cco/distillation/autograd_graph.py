"""What autograd's graph says of a network's outputs: which of them the loss is worked out of, and how it takes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_cco.compat.autograd import softmax_of

Point = tuple[Any, int]
"""A node of autograd's graph, and which of its outputs."""

# What leaves logits what they are: shapes, types, parts, temperatures and masks.
_PASSED = re.compile(
    r"(Alias|AsStrided|Cat|Clone|Div|Expand|Flip|Gather|Index|IndexSelect|MaskedFill|MaskedSelect|Mul|Permute|Repeat|ReshapeAlias|Select|Slice|Split"
    r"|SplitWithSizes|Squeeze|Stack|T|ToCopy|Transpose|Unbind|Unsqueeze|UnsafeView|UnsafeSplit|View|Where)Backward\d*$"
)
_OF_CLASSES = re.compile(r"(LogSoftmax|Softmax|Logsumexp|NllLoss|NllLoss2D)Backward\d*$")
_OF_QUESTIONS = re.compile(r"(BinaryCrossEntropyWithLogits|LogSigmoid|Sigmoid|Softplus)Backward\d*$")
_COMPILED = re.compile(r"Compiled")


@dataclass(frozen=True)
class Use:
    """How a loss takes an output.

    Attributes:
        kind: ``classes``: logits along ``dim``; ``questions``: a logit each; ``values``: neither.
        dim: The dimension of the classes.
    """

    kind: str
    dim: int = -1


class LossGraph:
    """Autograd's graph above a loss.

    Args:
        loss: The loss.
    """

    def __init__(self, loss: Tensor) -> None:
        self._users: dict[Any, list[tuple[int, Any]]] = {}
        self._last = loss.grad_fn
        seen, pending = set(), [loss.grad_fn] if loss.grad_fn is not None else []
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            for below, output in node.next_functions:
                if below is not None:
                    self._users.setdefault(below, []).append((output, node))
                    pending.append(below)

    def read_by_loss(self, outputs: Mapping[Any, Tensor]) -> list[Any]:
        """Those outputs, by key, that the loss reads itself, not only by way of another of them."""
        keys: dict[Point, list[Any]] = {}
        for key, tensor in outputs.items():
            keys.setdefault((tensor.grad_fn, tensor.output_nr), []).append(key)
        start = (self._last, 0)
        found = list(keys.get(start, []))
        seen, pending = {start}, [] if found or self._last is None else [self._last]
        while pending:
            for point in pending.pop().next_functions:
                if point[0] is None or point in seen:
                    continue
                seen.add(point)
                if point in keys:
                    found += keys[point]
                else:
                    pending.append(point[0])
        return [key for key in outputs if key in found]

    def is_compiled(self, tensor: Tensor) -> bool:
        """Whether compiled code made the tensor and hides what came of it."""
        node = tensor.grad_fn
        if node is None or not _COMPILED.search(node.name()):
            return False
        users = [user for _, user in self._users.get(node, [])]
        return node is self._last or any(_COMPILED.search(user.name()) for user in users)

    def use_of(self, tensor: Tensor) -> Use:
        """How the loss takes a tensor: the first operations after it that are no mere change of shape, type or scale."""
        found: set[Use] = set()
        other = False
        pending: list[Point] = [(tensor.grad_fn, tensor.output_nr)]
        seen: set[Point] = set(pending)
        while pending:
            node, output = pending.pop()
            for read, user in self._users.get(node, []):
                name = user.name()
                if read != output:
                    continue
                if _OF_CLASSES.match(name):
                    dim = _dimension(tensor, user)
                    found.add(Use("values") if dim is None else Use("classes", dim))
                elif _OF_QUESTIONS.match(name):
                    found.add(Use("questions"))
                elif _PASSED.match(name):
                    points = [(user, number) for number in range(_MOST_OUTPUTS)] if "Split" in name or "Unbind" in name else [(user, 0)]
                    pending += [point for point in points if point not in seen]
                    seen.update(points)
                else:
                    other = True
        classes = [use for use in found if use.kind == "classes"]
        if classes and Use("values") not in found:
            return classes[0] if len(classes) == 1 else Use("values")
        return Use("questions") if found == {Use("questions")} and not other else Use("values")


_MOST_OUTPUTS = 64


def ends_among(tensors: Mapping[Any, Tensor]) -> list[Any]:
    """Those tensors, by key, that no other of them is worked out of."""
    above: set[Any] = set()
    for tensor in tensors.values():
        pending = [below for below, _ in tensor.grad_fn.next_functions] if tensor.grad_fn is not None else []
        while pending:
            node = pending.pop()
            if node is not None and node not in above:
                above.add(node)
                pending += [below for below, _ in node.next_functions]
    return [key for key, tensor in tensors.items() if tensor.grad_fn not in above]


def _dimension(output: Tensor, node: Any) -> int | None:
    """The dimension of an output that a softmax is taken over, which may have seen the output in another shape."""
    shape, dim = softmax_of(node)
    if shape is None:
        return None
    size, own = shape[dim], list(output.shape)
    if len(own) == len(shape) and own[dim] == size:
        return dim % len(own)
    if own and own[-1] == size:
        return len(own) - 1
    return own.index(size) if size in own else None
