"""Who holds a gradient is found out once a process, wherever that happens, without being seen."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_cco import quantize
from lightning_cco.quantization.gradient_holders import fewest_holders


def test_hooks_for_saved_tensors_do_not_see_it() -> None:
    expected = fewest_holders()
    fewest_holders.cache_clear()
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append(tensor) or tensor, lambda tensor: tensor):
        assert fewest_holders() == expected
    assert seen == []


def test_the_first_forward_with_gradients_may_be_checkpointed() -> None:
    torch.manual_seed(0)
    body, x = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()), torch.randn(8, 1, 72, 72)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body, nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.body, x, use_reentrant=False).mean((2, 3)))

    model = Checkpointed()
    quantized = quantize(model, None, (x,))
    quantized.calibrate([(x,)])
    fewest_holders.cache_clear()
    model(x.requires_grad_()).sum().backward()
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for first, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(first, parameter.grad, rtol=0, atol=0)
