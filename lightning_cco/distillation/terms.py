"""How far a student's output is from its teacher's: pure functions, whose gradients go to the student alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def class_divergence(student: Tensor, teacher: Tensor, dim: int, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of the student's classes from the teacher's, as Hinton has it.

    Args:
        student: Logits of any shape.
        teacher: Logits of the same shape.
        dim: The dimension of the classes.
        temperature: What both are divided by first. The result is multiplied by its square, so that the gradient keeps its size.

    Returns:
        The mean over all other dimensions.

    >>> float(class_divergence(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]), 1, 2.0))
    0.0
    """
    mine, wanted = (F.log_softmax(wide(logits) / temperature, dim) for logits in (student, teacher))
    # A class that is ruled out by a logit of -inf adds nothing.
    each = torch.where(wanted.isneginf(), 0.0, wanted.exp() * (wanted - mine))
    return temperature**2 * each.sum(dim).mean()


def binary_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The same where each logit is a question of its own, with yes or no for an answer. Returns the mean over all of them."""
    mine, wanted = wide(student) / temperature, wide(teacher) / temperature
    yes = wanted.sigmoid() * (F.logsigmoid(wanted) - F.logsigmoid(mine))
    no = (-wanted).sigmoid() * (F.logsigmoid(-wanted) - F.logsigmoid(-mine))
    return temperature**2 * torch.where(_masked(mine, wanted), 0.0, yes + no).mean()


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of the squared difference."""
    mine, wanted = wide(student), wide(teacher)
    return torch.where(_masked(mine, wanted), 0.0, mine - wanted).square().mean()


def _masked(student: Tensor, teacher: Tensor) -> Tensor:
    """Where both are the same infinity, as masks write it: they agree, and their difference would be no number."""
    return teacher.isinf() & (student == teacher)


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Energy of the difference relative to the teacher's: equally much for layers of any size."""
    wanted = wide(teacher)
    return (wide(student) - wanted).square().sum() / wanted.square().sum().clamp_min(torch.finfo(wanted.dtype).tiny)


def wide(tensor: Tensor) -> Tensor:
    """A tensor of real numbers of at least 32 bits."""
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return real.float() if real.element_size() < 4 else real
