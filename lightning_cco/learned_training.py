"""Learned scales in a Lightning run: what they do not go together with, and how their rate follows the learning rate of the weights."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_cco.errors import CCOError
from lightning_cco.quantization.model import HookedModel
from lightning_cco.settings import Settings
from lightning_cco.strategies import is_sharded


def check_learned_scales(settings: Settings, trainer: pl.Trainer) -> None:
    """Say before the first step what learned scales do not go together with.

    Raises:
        CCOError: There are several optimizers, gradients are scaled, or parameters are in parts.
    """
    training = settings.training_settings
    asked = [f"{key}: learned" for key in ("range_estimator", "weight_estimator") if getattr(training, key) == "learned"]
    if not asked:
        return
    said, instead = f"training_settings.{asked[0]}", "Write mse."
    if len(trainer.optimizers) > 1:
        raise CCOError(
            f"{said}: expected one optimizer, got {len(trainer.optimizers)}. The gradient of one loss would move the scales of layers that another "
            f"optimizer trains. {instead}"
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise CCOError(
            f"{said}: Trainer(precision='{trainer.precision}') scales the loss, and the gradients of scales with it. Train with 'bf16-mixed' or '32-true', "
            f"or write mse."
        )
    assert trainer.lightning_module is not None
    if is_sharded(trainer.lightning_module):
        raise CCOError(
            f"{said}: this process holds only parts of the parameters, which scales of whole channels can't be learned from. {instead}"
        )


def follow_learning_rate(settings: Settings, trainer: pl.Trainer, quantized: HookedModel) -> None:
    """Let the rate of the scales fall as the learning rate of the weights does from its highest."""
    if not quantized.scales or not trainer.optimizers:
        return
    group = trainer.optimizers[0].param_groups[0]
    rates = [float(group[key]) for key in ("lr", "initial_lr", "max_lr") if group.get(key) is not None]
    highest = max(rates, default=0.0)
    quantized.scales.rate = settings.training_settings.scale_learning_rate * (rates[0] / highest if highest > 0 else 1.0)
