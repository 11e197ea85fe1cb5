"""The name of a tensor, and of its quantizer."""

from __future__ import annotations

import torch


class TensorKey(str):
    """A tensor: the layer that makes it, and its number among that layer's outputs. Its text is what checkpoints store.

    A tensor of the residual stream may be rounded twice: to 8 bits where it is made, and once more, ``as_read``, where layers of fewer bits read it.

    It equals its text, so dictionaries by tensor can be asked by name.

    >>> TensorKey("linear"), TensorKey("lstm", 1), TensorKey("lstm", 1).layer, TensorKey("relu", as_read=True)
    ('linear', 'lstm:1', 'lstm', 'relu:read')
    """

    __slots__ = ("as_read", "layer", "output")

    layer: str
    output: int
    as_read: bool

    def __new__(cls, layer: str, output: int = 0, as_read: bool = False) -> TensorKey:
        """Make the key of an output of a layer."""
        made = super().__new__(cls, (f"{layer}:{output}" if output else layer) + (":read" if as_read else ""))
        made.layer, made.output, made.as_read = layer, output, as_read
        return made

    def __reduce__(self) -> tuple[type[TensorKey], tuple[str, int, bool]]:
        return TensorKey, (self.layer, self.output, self.as_read)


# What users save by tensor, `torch.load` reads back as it does what is keyed by plain names.
torch.serialization.add_safe_globals([TensorKey])
