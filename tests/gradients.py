"""What the tests of fake-quantization share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def with_gradient(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The result of a function, and the gradient of its input for a gradient of its result."""
    x = x.detach().clone().requires_grad_()
    y = function(x)
    y.backward(grad)
    assert x.grad is not None
    return y.detach(), x.grad
