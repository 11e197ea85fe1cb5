"""The name of a tensor, and of its quantizer."""

from __future__ import annotations

import torch


class TensorKey(str):
    """A tensor: the layer that makes it, and its number among that layer's outputs. Its text is what checkpoints store.

    It equals its text, so dictionaries by tensor can be asked by name.

    >>> TensorKey("linear"), TensorKey("lstm", 1), TensorKey("lstm", 1).layer
    ('linear', 'lstm:1', 'lstm')
    """

    __slots__ = ("layer", "output")

    layer: str
    output: int

    def __new__(cls, layer: str, output: int = 0) -> TensorKey:
        """Make the key of an output of a layer."""
        made = super().__new__(cls, f"{layer}:{output}" if output else layer)
        made.layer, made.output = layer, output
        return made

    def __reduce__(self) -> tuple[type[TensorKey], tuple[str, int]]:
        return TensorKey, (self.layer, self.output)


# What users save by tensor, `torch.load` reads back as it does what is keyed by plain names.
torch.serialization.add_safe_globals([TensorKey])
