"""Which equations of `torch.einsum` are the product of a tensor with a matrix, once axes are moved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class MatrixProduct:
    """``einsum(equation, x, matrix)``, as ``(x.permute(of_x) @ matrix).permute(of_result)``.

    Attributes:
        of_x: The axes of ``x``, the one that is summed over last.
        transposed: Whether the matrix is transposed first.
        of_result: The axes of the result in the order that the equation wants.
    """

    of_x: tuple[int, ...]
    transposed: bool
    of_result: tuple[int, ...]


def matrix_product(equation: object, dimensions: int, matrix_dimensions: int) -> MatrixProduct | None:
    """The product that an equation is; `None` if it is another computation: of more axes, of one that both have and keep, a diagonal.

    >>> matrix_product("bti,oi->bto", 3, 2)
    MatrixProduct(of_x=(0, 1, 2), transposed=True, of_result=(0, 1, 2))
    >>> matrix_product("bti,tio->bto", 3, 3) is None
    True
    """
    terms, arrow, result = equation.replace(" ", "").partition("->") if isinstance(equation, str) else ("", "", "")
    if not arrow or terms.count(",") != 1 or matrix_dimensions != 2:
        return None
    of_x, of_matrix = terms.split(",")
    labels, matrix = _labels(of_x, dimensions), list(of_matrix)
    summed = [label for label in matrix if label in labels]
    if "." in matrix or len(summed) != 1 or len(set(labels)) < len(labels):
        return None
    made = [*(label for label in labels if label not in summed), *(label for label in matrix if label not in summed)]
    wanted = _labels(result, dimensions)
    if sorted(made) != sorted(wanted):
        return None
    return MatrixProduct(
        tuple(labels.index(label) for label in (*made[:-1], *summed)),
        matrix[1] in summed,
        tuple(made.index(label) for label in wanted),
    )


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
    x, matrix = given
    result = multiply(x.permute(product.of_x), matrix.t() if product.transposed else matrix)
    return result.permute(product.of_result)
