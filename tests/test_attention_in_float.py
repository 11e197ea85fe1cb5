"""Multi-head attention that nothing rounds is that of the float model to the last bit, although its products are looked into where something does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import quantize

SKIP_ALL = {"layer_settings": [{"match": "*", "skip_quantization": True}]}


class Attends(nn.Module):
    def __init__(self, needs_weights: bool, mask: str, direct: bool = False) -> None:
        super().__init__()
        self.needs_weights, self.mask, self.direct = needs_weights, mask, direct
        self.first, self.last = nn.Linear(8, 24), nn.Linear(24, 4)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=not direct)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = torch.relu(self.first(x))
        options: dict[str, Any] = {"need_weights": self.needs_weights}
        if self.mask == "float":
            options["attn_mask"] = torch.linspace(-1, 1, 49).reshape(7, 7)
        elif self.mask == "padding":
            options["key_padding_mask"] = torch.zeros(x.shape[0], 7, dtype=torch.bool).index_fill(1, torch.tensor([5, 6]), True)
        if self.direct:
            a = self.attention
            y, w = F.multi_head_attention_forward(
                x, x, x, 24, 4, a.in_proj_weight, a.in_proj_bias, None, None, False, 0.0, a.out_proj.weight, a.out_proj.bias, **options
            )
        else:
            y, w = self.attention(x, x, x, **options)
        return (self.last(y),) if w is None else (self.last(y), w)


def _gradients(model: nn.Module, outputs: tuple[Tensor, ...]) -> list[Tensor]:
    loss = torch.stack([output.square().sum() for output in outputs]).sum()
    return [gradient for gradient in torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) if gradient is not None]


@pytest.mark.filterwarnings("ignore:.*no layer is quantized")
@pytest.mark.parametrize("how", ["skipped", "disabled"])
@pytest.mark.parametrize(
    ("needs_weights", "mask", "direct"),
    [(True, "", False), (True, "float", False), (True, "padding", False), (False, "padding", False), (True, "", True)],
)
def test_what_is_not_rounded_is_the_float_run(needs_weights: bool, mask: str, direct: bool, how: str) -> None:
    torch.manual_seed(0)
    model, x = Attends(needs_weights, mask, direct), torch.randn(7 if direct else 3, 7, 8)
    wanted = model(x)
    gradients = _gradients(model, wanted)
    model.eval()
    with torch.no_grad():
        evaluated = model(x)
    model.train()
    quantized = quantize(model, SKIP_ALL if how == "skipped" else None, (x,))
    quantized.calibrate([x])
    model.train()
    if how == "skipped":
        found, in_evaluation = _run(model, x)
    else:
        assert not torch.equal(model(x)[0], wanted[0])
        with quantized.disabled():
            found, in_evaluation = _run(model, x)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(in_evaluation, evaluated, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(_gradients(model, found), gradients, strict=True))


def _run(model: nn.Module, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    trained = model.train()(x)
    with torch.no_grad():
        evaluated = model.eval()(x)
    model.train()
    return trained, evaluated
