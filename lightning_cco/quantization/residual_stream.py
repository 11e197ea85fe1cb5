"""The residual stream: the tensors that residual additions read, and the format that the settings give it.

A network with shortcuts passes most of what it knows from block to block in the sums of its residual additions. At few bits every one of them is rounded as
coarsely as what the convolutions read, though it is only added to. So the stream may keep 8 bits, or stay in float, while the layers that multiply
still read few bits (Liu et al., "Bi-Real Net", 2018, keep it in float with weights and activations of 1 bit).
"""

from __future__ import annotations

from collections.abc import Mapping

from lightning_cco.graph.layer import Layer
from lightning_cco.quantization.connections import Connections
from lightning_cco.quantization.ranges import FEW_BITS
from lightning_cco.quantization.rules import ResolvedRules
from lightning_cco.quantization.skip_reasons import Skip, SkipReason
from lightning_cco.quantization.tensor_key import TensorKey

INT8_BITS = 8
_ADDITIONS = frozenset({"add", "sub"})
_UP_TO = FEW_BITS - 1
"""Up to how many bits ``auto`` keeps the stream at 8 (`benchmarks/fashion.py`)."""


class ResidualStream:
    """Finds the residual additions of a graph: sums of two activations of one shape.

    Args:
        connections: The graph.
        setting: ``residual_stream`` of the recipe.
        rules: What the rules say of each layer.

    Attributes:
        additions: Names of the residual additions.
        tensors: What they read, by its origin: the results of the branches, and what earlier additions hand on. Where the stream is in float, not what those
            read that a rule quantizes by name.
    """

    def __init__(self, connections: Connections, setting: str, rules: Mapping[str, ResolvedRules]) -> None:
        self._connections, self._setting = connections, setting
        self.additions = {layer.name for layer in connections.graph if self._adds(layer)}
        self._kept = {name for name in self.additions if not (self.in_float and rules.get(name, ResolvedRules()).asked_for)}
        self.tensors = {key for name in self._kept for key in connections.sources(name)}

    def _adds(self, layer: Layer) -> bool:
        shapes = set(layer.input_shapes)
        sums = layer.kind in _ADDITIONS and len(self._connections.sources(layer.name)) == 2
        return sums and shapes == set(layer.output_shapes) and len(shapes) == 1

    @property
    def in_float(self) -> bool:
        """Whether the stream is not rounded."""
        return self._setting == "float"

    def keeps_float(self, key: TensorKey) -> bool:
        """Whether a tensor stays in float, to be rounded where INT8 layers read it."""
        return self.in_float and key in self.tensors

    def keeps_8_bits(self, key: TensorKey, num_bits: int) -> bool:
        """Whether a tensor keeps 8 bits, to be rounded to its own, fewer ones where layers that multiply read it."""
        wide = self._setting == "int8" or (self._setting == "auto" and num_bits <= _UP_TO)
        return wide and num_bits < INT8_BITS and key in self.tensors

    def keeps_few_bits(self, key: TensorKey) -> bool:
        """Whether the setting asks for a tensor to have the bits of all activations."""
        return self._setting == "quantized" and key in self.tensors

    def skips(self) -> dict[str, Skip]:
        """Why the additions are in float; empty if they are not."""
        return {name: Skip(SkipReason.SETTING, "residual_stream: float") for name in self._kept} if self.in_float else {}
