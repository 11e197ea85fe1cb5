"""Fused groups: conv → batch norm (→ addition, for some engines) → activation is computed as one, and quantized at its end."""

from __future__ import annotations

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
    """

    def __init__(self, connections: Connections, target: Target, skips: dict[str, Skip]) -> None:
        self._connections, self._target, self._skips = connections, target, skips
        self._graph = connections.graph

    def folds(self, name: str, norm: str) -> bool:
        """Whether a batch norm's factors go into the weights of the layer before it: its channels are that layer's."""
        layer, after = self._graph[name], self._graph[norm]
        if not layer.weighted or layer.attributes.get("made_bias"):
            return False  # what the forward makes can't take factors in
        if not operation_of_kind(layer.kind).takes_norm or self._connections.only_reader(name) != norm or not layer.output_shapes:
            return False
        if after.kind != "batch_norm" or not has_statistics(after) or not self._engine_decides(norm):
            return False
        if layer.kind == "conv_transpose" and layer.attributes.get("groups", 1) != 1:
            return False  # groups share the scale of a channel, but not the norm's factor
        return len(layer.output_shapes[0]) == _dimensions(layer) and after.input_shapes[:1] == layer.output_shapes[:1]

    def _engine_decides(self, name: str) -> bool:
        skip = self._skips.get(name)
        return skip is None or skip.reason is SkipReason.ENGINE

    def clamped_by(self, clamp: str, int8: set[str]) -> str | None:
        """The INT8 layer whose result a clamp alone reads, if need be after a batch norm; None if there is none."""
        reads = self._connections.reads
        if len(reads[clamp]) != 1 or self._connections.only_reader(reads[clamp][0].layer) != clamp:
            return None
        source = reads[clamp][0].layer
        if self._graph[source].kind == "batch_norm" and len(reads[source]) == 1 and self.folds(reads[source][0].layer, source):
            source = reads[source][0].layer
        return source if source in int8 else None

    def find(self, int8: set[str]) -> dict[str, str]:
        """For each layer inside a fused group the next one in it. Batch norms that fold join ``int8``, or leave it with a layer computed in float."""
        fused: dict[str, str] = {}
        for layer in self._graph:
            weight_only = layer.name in self._skips and self._skips[layer.name].reason is SkipReason.WEIGHT_ONLY
            op = operation_of_kind(layer.kind)
            if (layer.name not in int8 and not weight_only) or op.recurrent or op.looks_up:
                continue
            end = layer.name
            norm = self._connections.only_reader(end)
            if norm is not None and self.folds(end, norm):
                if weight_only:
                    int8.discard(norm)
                    self._skips[norm] = Skip(SkipReason.ENGINE, f"it folds into '{end}', which {self._target.name} computes in float")
                else:
                    int8.add(norm)
                fused[end] = norm
                end = norm
            after = self._connections.only_reader(end)
            if (
                end in int8
                and after in int8
                and (self._is_plain_clamp(after) or (self._adds_before_rounding(layer, after) and after not in fused.values()))
            ):
                fused[end] = after
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


def _dimensions(layer: Layer) -> int:
    """Dimensions of a result with a batch and channels: without a batch the channels of a norm would be others."""
    kernel, weight = layer.attributes.get("kernel_size"), layer.attributes.get("weight_shape")
    if layer.kind == "linear":
        return 2
    if isinstance(kernel, tuple):
        return len(kernel) + 2
    return len(weight) if isinstance(weight, tuple) else len(layer.output_shapes[0])
