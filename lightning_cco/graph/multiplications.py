"""How many numbers a call multiplies: products of weights and activations, or of two activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_cco.graph.ops import Category, Op


def multiplications(op: Op, args: tuple[Any, ...], outputs: Sequence[Tensor], weights: Sequence[Tensor]) -> int:
    """Count the multiplications of a call, for the batch that it was given; additions, norms and lookups count nothing.

    Args:
        op: What it is.
        args: Its positional arguments.
        outputs: What it returns.
        weights: Those of its constant operands that are weights.
    """
    if op.recurrent:  # (steps, batch, features), (batch, steps, features), or packed: (all steps, features)
        return outputs[0].numel() // max(1, outputs[0].shape[-1]) * sum(weight.numel() for weight in weights)
    if op.category is Category.WEIGHTED:
        return _of_weights(op, args, outputs, weights)
    if op.category is not Category.MATMUL:
        return 0
    if op.mask is not None:
        return _of_attention(args)
    if op.kind == "einsum":
        return _of_einsum(args)
    tensors = [value for value in args[int(op.adds_first) :] if isinstance(value, Tensor)]
    return outputs[0].numel() * tensors[0].shape[-1] if len(tensors) == 2 and tensors[0].dim() else 0


def _of_weights(op: Op, args: tuple[Any, ...], outputs: Sequence[Tensor], weights: Sequence[Tensor]) -> int:
    if op.looks_up or not weights:
        return 0
    weight, out = weights[0], outputs[0]
    if op.kind == "linear":
        return out.numel() * weight.shape[-1]
    if op.kind == "conv":  # (output channels, input channels of a group, kernel)
        return out.numel() * weight[0].numel()
    if op.kind == "conv_transpose" and args and isinstance(args[0], Tensor):  # (input channels, output channels of a group, kernel)
        return args[0].numel() * weight[0].numel()
    if op.kind.endswith("_cell"):
        return out.numel() // max(1, out.shape[-1]) * sum(each.numel() for each in weights)
    return out.numel() * weight[0].numel()  # as far as is known, each value of the result is a product with a row of the weight


def _of_attention(args: tuple[Any, ...]) -> int:
    """Query times key, and the result times value: (batch, heads, queries, features), (batch, heads, keys, features)."""
    if len(args) < 3:
        return 0
    query, key, value = args[:3]
    return int(query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1]))


def _of_einsum(args: tuple[Any, ...]) -> int:
    """The product of the sizes of all indices; axes of an ellipsis are counted from the right."""
    if not args or not isinstance(args[0], str):
        return 0
    tensors = list(args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:])
    sizes: dict[str, int] = {}
    for term, tensor in zip(args[0].replace(" ", "").split("->")[0].split(","), tensors, strict=False):
        before, dots, after = term.partition("...")
        between = tensor.dim() - len(before) - len(after) if dots else 0
        labels = [*before, *(f"...{between - axis}" for axis in range(between)), *after]
        for label, size in zip(labels, tensor.shape, strict=False):
            sizes[label] = max(size, sizes.get(label, 1))
    return math.prod(sizes.values()) if len(tensors) > 1 else 0
