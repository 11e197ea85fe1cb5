"""Which equations of `torch.einsum` are the product of a tensor with a matrix, once axes are moved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_cco.graph.call import ArgPath


@dataclass(frozen=True)
class MatrixProduct:
    """``einsum(equation, x, weight)``: ``x.permute(of_x)`` times ``weight.permute(of_weight)`` as a matrix, and the result's axes in another order.

    Attributes:
        of_x: The axes of ``x``, those that are summed over last.
        of_weight: The axes of the weight, those that are summed over first, in the same order.
        summed: How many axes are summed over.
        of_result: The axes of the result in the order that the equation wants.
    """

    of_x: tuple[int, ...]
    of_weight: tuple[int, ...]
    summed: int
    of_result: tuple[int, ...]

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as a matrix, whose rows are summed over."""
        moved = weight if self.of_weight == tuple(range(weight.dim())) else weight.permute(self.of_weight)
        moved = moved.flatten(0, self.summed - 1) if self.summed > 1 else moved
        return moved.flatten(1) if moved.dim() > 2 else moved

    def apply(self, x: Tensor, weight: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The result of the equation; `multiply` gets ``x``, its last axis summed over, and the matrix."""
        rows = x.permute(self.of_x)
        result = multiply(rows.flatten(-self.summed) if self.summed > 1 else rows, self.matrix(weight))
        made = [weight.shape[axis] for axis in self.of_weight[self.summed :]]
        return (result.reshape(*result.shape[:-1], *made) if len(made) > 1 else result).permute(self.of_result)


def matrix_product(equation: object, dimensions: int, weight_dimensions: int) -> MatrixProduct | None:
    """The product that an equation is; `None` if it is another computation: of an axis that both have and keep, a diagonal, a sum of one operand.

    Args:
        equation: As for `torch.einsum`; other forms than a text with an arrow are no such product.
        dimensions: Of the first operand.
        weight_dimensions: Of the second.

    >>> matrix_product("bti,oi->bto", 3, 2)
    MatrixProduct(of_x=(0, 1, 2), of_weight=(1, 0), summed=1, of_result=(0, 1, 2))
    >>> matrix_product("bthd,ohd->bto", 4, 3).summed
    2
    >>> matrix_product("bti,tio->bto", 3, 3) is None
    True
    """
    terms, arrow, result = equation.replace(" ", "").partition("->") if isinstance(equation, str) else ("", "", "")
    if not arrow or terms.count(",") != 1:
        return None
    of_x, of_weight = terms.split(",")
    labels, weight = _labels(of_x, dimensions), list(of_weight)
    summed = [label for label in labels if label in weight]
    kept, made = [label for label in labels if label not in summed], [label for label in weight if label not in summed]
    if (
        "." in weight
        or len(weight) != weight_dimensions
        or not summed
        or not made
        or len({*labels}) < len(labels)
        or len({*weight}) < len(weight)
    ):
        return None
    wanted = _labels(result, dimensions)
    if sorted([*kept, *made]) != sorted(wanted):
        return None
    return MatrixProduct(
        tuple(labels.index(label) for label in (*kept, *summed)),
        tuple(weight.index(label) for label in (*summed, *made)),
        len(summed),
        tuple([*kept, *made].index(label) for label in wanted),
    )


def output_axis(args: tuple[Any, ...], slot: ArgPath, weight: Tensor) -> int | None:
    """The axis of a weight that counts outputs, each of which has a scale; `None` where the call is no product with a matrix.

    Of several (heads and their features) it is the longest, since an engine takes one axis.

    Args:
        args: Arguments of `torch.einsum`.
        slot: Which of them the weight is.
        weight: Of any number of dimensions.
    """
    given = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    if slot not in ((2,), (1, 1)) or len(given) != 2:
        return None
    product = matrix_product(args[0], given[0].dim(), weight.dim())
    return max(product.of_weight[product.summed :], key=lambda axis: weight.shape[axis]) if product is not None else None


def _labels(term: str, dimensions: int) -> list[str]:
    """A label for each axis; those of an ellipsis are counted."""
    before, dots, after = term.partition("...")
    between = dimensions - len(before) - len(after) if dots else 0
    return [*before, *(f"...{axis}" for axis in range(between)), *after]


def einsum_by_matmul(equation: Any, *operands: Any, multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> Tensor:
    """`torch.einsum`, written as a product with a matrix where it is one, which engines have an INT8 kernel of.

    Args:
        equation: As for `torch.einsum`.
        *operands: Likewise.
        multiply: Makes the product.
    """
    given = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    product = matrix_product(equation, given[0].dim(), given[1].dim()) if len(given) == 2 else None
    if product is None:
        return torch.einsum(equation, *operands)
    return product.apply(given[0], given[1], multiply)
