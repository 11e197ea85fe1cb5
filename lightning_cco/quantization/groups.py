"""Fused groups: conv → batch norm or constants (→ addition, for some engines) → activation is computed as one, and quantized at its end.

What multiplies each output channel of a layer by a constant, or adds one to it, is a batch norm whose statistics are frozen, or a LayerScale. Like a batch norm
it *folds* into the weights of the layer before it: the scale of a channel takes the factor, so that the integers stay those that training rounds to.
"""

from __future__ import annotations

from collections.abc import Collection

from lightning_cco.graph.channel_constants import along_axis
from lightning_cco.graph.layer import Layer
from lightning_cco.graph.ops import Category, operation_of_kind
from lightning_cco.quantization.connections import Connections
from lightning_cco.quantization.skip_reasons import Skip, SkipReason
from lightning_cco.quantization.targets import Target


def has_statistics(layer: Layer) -> bool:
    """Whether a batch norm has running statistics, so that it is one factor and one shift for each channel."""
    return layer.attributes.get("running_statistics") is not False


class Groups:
    """Finds what belongs together.

    Args:
        connections: The graph.
        target: The engine.
        skips: Why layers are left in float; changed by `find`.
        in_rows: Layers whose scales are not those of channels: weights in groups, or with zero points.

    Attributes:
        folding: For each layer that folds into another's weights, if those are quantized, that layer.
    """

    def __init__(self, connections: Connections, target: Target, skips: dict[str, Skip], in_rows: Collection[str] = ()) -> None:
        self._connections, self._target, self._skips = connections, target, skips
        self._graph = connections.graph
        self._chains = {layer.name: self._chain(layer) for layer in self._graph if layer.name not in in_rows and _takes_factors(layer)}
        self.folding = {after: name for name, chain in self._chains.items() for after in chain}

    def folded_into(self, name: str) -> str:
        """The layer whose weights are quantized and take in what a layer computes; of any other layer itself."""
        head = self.folding.get(name, name)
        return head if head not in self._skips or self._skips[head].reason is SkipReason.WEIGHT_ONLY else name

    def _chain(self, layer: Layer) -> list[str]:
        """The layers that fold into a layer's weights, one after the other."""
        found: list[str] = []
        end, axis = layer.name, _channel_axis(layer)
        while True:
            after = self._connections.only_reader(end)
            if after is None:
                return found
            if (moved := self._axis_after(layer, after, axis)) is not None:
                end, axis = after, moved
            elif self._norm_folds(layer, after, axis) or self._constant_folds(layer, after, axis):
                found.append(after)
                end = after
            else:
                return found

    def _axis_after(self, layer: Layer, name: str, axis: int) -> int | None:
        """The axis of the channels after a layer that computes nothing in the file, or only moves values; `None` after others."""
        if self._connections.category[name] is Category.IDENTITY:
            return axis
        # Where an engine rounds the result itself, the rounding has to follow at once.
        order = self._graph[name].attributes.get("dims")
        if self._graph[name].kind != "permute" or layer.kind not in self._target.float_outputs or not isinstance(order, tuple):
            return None
        return [place % len(order) for place in order].index(axis)

    def _norm_folds(self, layer: Layer, name: str, axis: int) -> bool:
        """Whether a batch norm folds: its channels are the layer's."""
        norm = self._graph[name]
        if norm.kind != "batch_norm" or not has_statistics(norm) or not self._may_fold(name):
            return False
        return axis == 1 and len(layer.output_shapes[0]) == _dimensions(layer) and norm.input_shapes[:1] == layer.output_shapes[:1]

    def _constant_folds(self, layer: Layer, name: str, axis: int) -> bool:
        """Whether a multiplication by a constant, or an addition of one, folds: it has one value for each output channel of a layer, or for all."""
        after = self._graph[name]
        if (
            after.constant is None
            or not self._may_fold(name)
            or (layer.kind != "linear" and len(layer.output_shapes[0]) != _dimensions(layer))
        ):
            return False
        return along_axis(after.constant, after.output_shapes[0], axis)

    def _may_fold(self, name: str) -> bool:
        skip = self._skips.get(name)
        return skip is None or skip.reason in (SkipReason.ENGINE, SkipReason.TAIL)

    def clamped_by(self, clamp: str, int8: set[str]) -> str | None:
        """The INT8 layer whose result a clamp alone reads, if need be after a batch norm; None if there is none."""
        reads = self._connections.reads
        if len(reads[clamp]) != 1 or self._connections.only_reader(reads[clamp][0].layer) != clamp:
            return None
        source = reads[clamp][0].layer
        source = self.folded_into(source)
        return source if source in int8 else None

    def find(self, int8: set[str]) -> dict[str, str]:
        """For each layer inside a fused group the next one in it. Those that fold join ``int8``, or leave it with a layer computed in float."""
        fused: dict[str, str] = {}
        for layer in self._graph:
            weight_only = layer.name in self._skips and self._skips[layer.name].reason is SkipReason.WEIGHT_ONLY
            op = operation_of_kind(layer.kind)
            if (layer.name not in int8 and not weight_only) or op.recurrent or op.looks_up:
                continue
            end = layer.name
            for after in self._chains.get(layer.name, ()):
                if weight_only:
                    int8.discard(after)
                    self._skips[after] = Skip(
                        SkipReason.ENGINE, f"it folds into '{layer.name}', which {self._target.name} computes in float"
                    )
                else:
                    int8.add(after)
                fused[end] = after
                end = after
            reader = self._connections.only_reader(end)
            if (
                end in int8
                and reader in int8
                and (self._is_plain_clamp(reader) or (self._adds_before_rounding(layer, reader) and reader not in fused.values()))
            ):
                fused[end] = reader
        for name in int8:
            self._skips.pop(name, None)
        return fused

    def _adds_before_rounding(self, layer: Layer, addition: str) -> bool:
        """Whether an addition of another activation of the same shape is computed together with a layer. Of two such layers it is computed with the first."""
        same = set(self._graph[addition].input_shapes) == set(self._graph[addition].output_shapes)
        two = len(self._connections.sources(addition)) == 2
        return layer.kind in self._target.adds_before_rounding and self._graph[addition].kind == "add" and same and two

    def _is_plain_clamp(self, name: str) -> bool:
        return self._connections.category[name] is Category.CLAMP and len(self._connections.reads[name]) == 1


def _takes_factors(layer: Layer) -> bool:
    """Whether a layer has weights that take the factor of each channel in."""
    if not layer.weighted or not operation_of_kind(layer.kind).takes_norm or layer.attributes.get("made_bias") or not layer.output_shapes:
        return False  # what the forward makes can't take factors in
    # Groups of a transposed convolution share the scale of a channel, but not the factor.
    return layer.kind != "conv_transpose" or layer.attributes.get("groups", 1) == 1


def _channel_axis(layer: Layer) -> int:
    return len(layer.output_shapes[0]) - 1 if layer.kind == "linear" else 1


def _dimensions(layer: Layer) -> int:
    """Dimensions of a result with a batch and channels: without a batch the channels of a norm would be others."""
    kernel, weight = layer.attributes.get("kernel_size"), layer.attributes.get("weight_shape")
    if layer.kind == "linear":
        return 2
    if isinstance(kernel, tuple):
        return len(kernel) + 2
    return len(weight) if isinstance(weight, tuple) else len(layer.output_shapes[0])
