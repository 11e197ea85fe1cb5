"""A model whose capture in training mode fails, as a detector's that wants targets: its layers of the training alone are never silently in float."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import CCOWarning, QuantizedModel, quantize


class WantsTargets(nn.Module):
    """Without targets its forward raises while it trains; with them it returns a loss."""

    def __init__(self, loss: Callable[[WantsTargets, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.head, self.auxiliary = nn.Linear(8, 4), nn.Linear(8, 4)
        self.prototypes = nn.Parameter(torch.randn(4, 8))
        self.loss = loss

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        features = self.body(images).mean((2, 3))
        if not self.training:
            return self.head(features)
        if targets is None:
            raise ValueError("targets were expected")
        return F.cross_entropy(self.head(features), targets) + self.loss(self, features, targets)


def trained(loss: Callable[[WantsTargets, Tensor, Tensor], Tensor]) -> QuantizedModel:
    """One step of training, after a calibration without targets."""
    images = torch.randn(4, 3, 8, 8)
    quantized = quantize(WantsTargets(loss), {"global_quantization_settings": {"skip_tail_quantization": False}}, (images,))
    quantized.calibrate([[images]])
    quantized.model.train()
    quantized.model(images, torch.tensor([0, 1, 2, 3])).backward()
    return quantized


LAYERS: dict[str, tuple[Callable[[WantsTargets, Tensor, Tensor], Tensor], str]] = {
    "a head of its own": (lambda model, x, t: F.cross_entropy(model.auxiliary(x), t), "'linear' was called in 'auxiliary'.*forward_fn"),
    "a function with a parameter": (
        lambda model, x, t: F.cross_entropy(F.linear(x, model.prototypes), t),
        "'linear' was called in 'the root module'",
    ),
    "a product with a parameter": (
        lambda model, x, t: F.cross_entropy(x @ model.prototypes.T, t),
        "'matmul' was called in 'the root module'",
    ),
    "the head once more": (lambda model, x, t: F.cross_entropy(model.head(x.flip(0)), t), "'linear' was called in 'head#1'"),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_of_the_training_alone_are_named(kind: str) -> None:
    loss, said = LAYERS[kind]
    with pytest.warns(CCOWarning, match=said):
        quantized = trained(loss)
    assert len(quantized.drift) == 1


@pytest.mark.parametrize(
    "loss",
    [
        lambda model, x, t: F.mse_loss(x, x.detach().flip(0)),
        lambda model, x, t: F.cross_entropy(F.normalize(x) @ F.normalize(x).T, t),  # contrastive
        lambda model, x, t: (F.softmax(x, dim=1) - 0.5).clamp(min=0).mul(2).sum(),
    ],
)
def test_losses_are_not(loss: Callable[[WantsTargets, Tensor, Tensor], Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CCOWarning)
        assert trained(loss).drift == []
