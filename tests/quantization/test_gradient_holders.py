"""Who holds a gradient is found out once a process, wherever that happens, without being seen."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_cco import quantize
from lightning_cco.quantization import gradient_holders
from lightning_cco.quantization.fake_quantize import fake_quantize
from lightning_cco.quantization.gradient_holders import fewest_holders


def test_hooks_for_saved_tensors_do_not_see_it() -> None:
    expected = fewest_holders()
    gradient_holders._found.clear()
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
    gradient_holders._found.clear()
    model(x.requires_grad_()).sum().backward()
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for first, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(first, parameter.grad, rtol=0, atol=0)


def _gradients(keep: bool) -> tuple[bool, Tensor, Tensor]:
    """Whether the backward of a rounding overwrites what it is given, that, and what it was when somebody kept it."""
    seen: list[Tensor] = []
    addresses = []
    x, weight = torch.randn(400, requires_grad=True), torch.arange(400.0)
    before = x * 1.0
    before.register_hook(lambda grad: addresses.append(grad.data_ptr()))
    y = fake_quantize(before, torch.tensor(0.001), torch.tensor(0.0), 8, numbers=(0.001, 0.0))
    y.register_hook(lambda grad: (addresses.append(grad.data_ptr()), seen.append(grad) if keep else None)[1])
    (y * weight).sum().backward()
    return addresses[0] == addresses[1], weight, seen[0] if keep else weight


def test_what_was_found_out_under_a_compiler_holds_for_no_other_calls() -> None:
    gradient_holders._found.clear()
    try:
        torch.compile(torch._dynamo.disable(fewest_holders, recursive=False), backend="eager")()
    finally:
        torch._dynamo.reset()
    assert gradient_holders._found
    assert _gradients(keep=False)[0]
    overwritten, expected, kept = _gradients(keep=True)
    assert not overwritten
    torch.testing.assert_close(kept, expected, rtol=0, atol=0)
