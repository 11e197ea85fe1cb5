"""The operators of PyTorch's programs with quantized operators (PT2E), whose home moves from torch to torchao."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch

from lightning_cco.compat.resolve import find, missing_message
from lightning_cco.errors import CCOError

HOME = "torch.ao.quantization.fx._decomposed"
"""The module whose import registers them; nothing in it is called."""


@dataclass(frozen=True)
class Operators:
    """Overloads of ``torch.ops.quantized_decomposed``.

    Attributes:
        quantize: By one scale and zero point.
        dequantize: By one scale and zero point.
        dequantize_channels: By those of each channel.
        dequantize_groups: By those of each group of inputs.
    """

    quantize: Any
    dequantize: Any
    dequantize_channels: Any
    dequantize_groups: Any


def operators() -> Operators:
    """The operators, registered if need be: it takes a while, so it is not done at import.

    Private API: ``torch.ao.quantization.fx._decomposed``. Without it: those that something else has registered, else an error.

    Raises:
        CCOError: There are none.
    """
    with contextlib.suppress(AttributeError):  # something else may have registered them
        find(f"{HOME}.quantize_per_tensor")
    names = ("quantize_per_tensor", "dequantize_per_tensor", "dequantize_per_channel", "dequantize_per_channel_group")
    try:
        return Operators(*(getattr(torch.ops.quantized_decomposed, name).default for name in names))
    except AttributeError as error:
        raise CCOError(f"export: {missing_message([HOME])}") from error
