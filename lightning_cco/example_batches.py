"""What the batches that the callback holds are used for, other than measuring: examples for exports, and ranges for weights that were loaded without any."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities import rank_zero_info
from lightning_utilities.core.rank_zero import rank_zero_debug

from lightning_cco.batches import ForwardFn, forward_arguments, forward_through_model, on_a_copy
from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.export.nested_tensors import leaves
from lightning_cco.export.step_network import StepNetwork, network_of_the_step
from lightning_cco.quantized_model import QuantizedModel

Calls = Sequence[tuple[Sequence[Any], Mapping[str, Any]]]
"""Positional and keyword arguments of some forwards."""


def calls_of(quantized: QuantizedModel, held: Sequence[Any], forward: ForwardFn | None) -> tuple[Calls, StepNetwork | None]:
    """The calls that a file holds, one for each held batch; and the part of the step that it holds, where that is not the model's ``forward``.

    Raises:
        CCOError: There are no held batches.
    """
    if not held or forward is None:
        raise CCOError(
            "CCOCallback.export: no example of forward's arguments is known. Pass example_args=(tensor, ...) or example_kwargs={...}."
        )
    batches = [move_data_to_device(batch, quantized.device) for batch in held]
    if forward is forward_through_model:
        return [forward_arguments(quantized.model, batch) for batch in batches], None
    networks = [network_of_the_step(quantized, on_a_copy(forward), batch) for batch in batches]
    return [(network.args, network.kwargs) for network in networks], networks[0]


def checks_of(quantized: QuantizedModel, calls: Calls, validation: Sequence[Any], forward: ForwardFn | None) -> tuple[list[Any], str]:
    """The batches that a file is checked on: those of the validation where they go through the model as the held ones do.

    Args:
        quantized: The model.
        calls: Those of the held batches.
        validation: Batches of the validation.
        forward: How a batch goes through the model.

    Returns:
        Arguments of each call, and where they come from, in words.
    """
    try:
        others = calls_of(quantized, validation, forward)[0]
        if all(_form(other) == _form(calls[0]) for other in others):
            return [kwargs or args for args, kwargs in others], "validation batches, which the calibration has not seen"
    except Exception as error:  # a validation batch may hold something else than the step of the training takes
        rank_zero_debug(
            f"The file is checked on batches of the training, since the validation's do not fit the model as the training's do: {error}"
        )
    return [kwargs or args for args, kwargs in calls], "held batches"


def _form(call: tuple[Sequence[Any], Mapping[str, Any]]) -> Any:
    """What two calls of one file have in common: their arguments, and types and dimensions of the tensors in them."""
    return [(slot, value.dtype, value.dim()) if isinstance(value, torch.Tensor) else (slot, type(value)) for slot, value in leaves([*call])]


def calibrate_on_held(quantized: QuantizedModel, held: Sequence[Any], forward: ForwardFn | None, where: str) -> None:
    """Calibrate for weights that came without ranges.

    Args:
        quantized: The model with these weights.
        held: The batches.
        forward: How a batch goes through the model.
        where: Where the weights came from, and what that lacks, for messages.
    """
    if not held or forward is None:
        warnings.warn(
            f"{where}, and the callback keeps no batches to calibrate on: the ranges are those of other weights. Test a whole checkpoint.",
            CCOWarning,
            stacklevel=3,
        )
        return
    frozen = quantized.frozen
    batches = [move_data_to_device(batch, quantized.device) for batch in held]
    with torch.inference_mode(False):
        quantized.calibrate(batches, on_a_copy(forward))
    if frozen:
        quantized.freeze_ranges()
    rank_zero_info(f"{where}: calibrated on the {len(batches)} batches kept by the callback, for its weights.")
