"""What can be said of a recipe before the float validation, which may take long: whether its rules fit the layers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_debug

from lightning_cco.batch_prefetch import copied
from lightning_cco.batches import ForwardFn, forward_through_model, model_context, overrides_forward, rehearsed
from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.graph.capture import capture
from lightning_cco.quantization.planner import plan_quantization
from lightning_cco.settings import Settings


def check_rules(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, forward_fn: ForwardFn | None, settings: Settings) -> list[str]:
    """Plan the layers that a validation batch reaches, so that a rule that fits none of them ends the run now, and one without effect is said now.

    The model is captured again, from a training batch, when the training starts. Where the validation batch does not go through ``forward``, nothing is
    checked here: a step of the training is never run before it.

    Args:
        trainer: The Trainer.
        module: The module.
        batch: The first batch of the first validation.
        forward_fn: The user's way of a batch through the model.
        settings: The recipe.

    Returns:
        The warnings that were given, which the plan of the training need not repeat.

    Raises:
        CCOError: A rule matches no layer, or contradicts another.
    """
    forward = rehearsed(forward_fn) if forward_fn is not None else (forward_through_model if overrides_forward(module) else None)
    if not settings.layer_settings or forward is None:
        return []
    with model_context(trainer):
        try:
            graph = capture(module, lambda: forward(module, copied(batch))).graph
        except CCOError as error:
            rank_zero_debug(
                f"The rules are checked when the training starts, since a validation batch does not go through `forward`: {error}"
            )
            return []
    reads = {name for layer in graph for name in layer.parameters}
    if any(name not in reads for name, parameter in module.named_parameters() if parameter.requires_grad):
        return []  # the training may reach more layers, which the rules may name
    with warnings.catch_warnings(record=True) as given:
        plan_quantization(graph, settings)
    for warning in given:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return [str(warning.message) for warning in given]


@contextmanager
def unrepeated(said: Iterable[str]) -> Iterator[None]:
    """Inside the block these warnings are not given again."""
    with warnings.catch_warnings():
        for message in said:
            warnings.filterwarnings("ignore", message=re.escape(message), category=CCOWarning)
        yield
