"""The operators of PyTorch's quantized programs (PT2E), whose home has moved from torch to torchao and is to move again."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import torch

HOMES = (
    "torch.ao.quantization.fx._decomposed",
    "torchao.quantization.pt2e._decomposed",
    "torchao.quantization.quantize_.common._decomposed",
)
"""Modules whose import registers ``torch.ops.quantized_decomposed``, the first one that is there. Without one: `ImportError` where a program is written."""


def operators() -> Any:
    """``quantized_decomposed``: ``quantize``, ``dequantize``, ``dequantize_channels`` and ``dequantize_groups``, each one overload.

    Raises:
        ImportError: Neither the installed torch nor torchao has them.
    """
    for home in HOMES:
        try:
            importlib.import_module(home)
            found = torch.ops.quantized_decomposed
            return SimpleNamespace(
                quantize=found.quantize_per_tensor.default,
                dequantize=found.dequantize_per_tensor.default,
                dequantize_channels=found.dequantize_per_channel.default,
                dequantize_groups=found.dequantize_per_channel_group.default,
            )
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"no module of {', '.join(HOMES)} registers torch.ops.quantized_decomposed")
