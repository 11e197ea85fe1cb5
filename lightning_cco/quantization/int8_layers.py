"""Which layers compute in INT8: those that may, and whose neighbours make it worth it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lightning_cco.graph.layer import Layer
from lightning_cco.graph.ops import Category, operation_of_kind
from lightning_cco.quantization.connections import Connections
from lightning_cco.quantization.exact_readers import ExactReaders
from lightning_cco.quantization.groups import Groups, has_statistics
from lightning_cco.quantization.int8_conditions import reads_one
from lightning_cco.quantization.residual_stream import ResidualStream
from lightning_cco.quantization.rules import ResolvedRules
from lightning_cco.quantization.skip_reasons import Skip, SkipReason
from lightning_cco.quantization.targets import Target
from lightning_cco.quantization.tensor_key import TensorKey


class Int8Layers:
    """Finds the layers that compute in INT8, and what is fused with them.

    Args:
        connections: Who makes and reads each tensor.
        target: The engine.
        rules: What the rules say of each layer.
        skips: Layers that are left in float; those that are found to be are added.
        exact: Who needs tensors as they are.
        stream: What residual additions read.
        in_rows: Layers whose weights are in groups, or have zero points.

    Attributes:
        names: The layers.
        fused_into: The layer that each fused layer's result goes into.
        folded: For each layer that folds into quantized weights, whose they are.
    """

    def __init__(
        self,
        connections: Connections,
        target: Target,
        rules: Mapping[str, ResolvedRules],
        skips: dict[str, Skip],
        exact: ExactReaders,
        stream: ResidualStream,
        in_rows: Collection[str] = (),
    ) -> None:
        self.graph, self.connections, self.target = connections.graph, connections, target
        self._rules, self._skips, self._exact, self._stream = rules, skips, exact, stream
        self._groups = Groups(connections, target, skips, in_rows)
        self._find()
        while self._leave_without_integer_outputs():
            self._find()

    def _find(self) -> None:
        self.names = self._allowed()
        self.fused_into = self._groups.find(self.names)
        self.folded = {name: head for name, head in self._groups.folding.items() if name in self.fused_into.values()}

    def computed_with(self, name: str) -> str:
        """The layer that a multiplication by constants, or an addition of them, folds into; of any other layer, also a batch norm, itself."""
        return name if self.graph[name].constant is None else self._groups.folded_into(name)

    def quantizable(self, key: TensorKey) -> bool:
        """Whether a tensor holds floats that can be rounded."""
        layer = self.graph[key.layer]
        if layer.kind == "input" and layer.name in self._skips:
            return False
        return self.connections.is_float(key) and (not layer.quantizable_outputs or layer.quantizable_outputs[key.output])

    def _leave_without_integer_outputs(self) -> bool:
        """Leave layers in float whose result is in float, if their engine computes them in INT8 only where it is rounded; returns whether there were any."""
        found = False
        kinds = self.target.integer_outputs
        heads = self.names - self.folded.keys()  # what folds stays with its layer
        for name in [name for name in heads if self.graph[name].kind in kinds and not self._asked_for(name)]:
            key = TensorKey(name)
            while key.layer in self.fused_into:
                key = TensorKey(self.fused_into[key.layer])
            by_setting = self._stream.keeps_float(key)
            needed = self._exact.reads_for_output(key)
            if not by_setting and not needed:
                continue
            reason = SkipReason.SETTING if by_setting else SkipReason.ENGINE
            reason = SkipReason.WEIGHT_ONLY if self.target.stores_weights(self.graph[name]) else reason
            why = "is in float (residual_stream: float)" if by_setting else f"is needed as it is, since it {needed}"
            self._skips[name] = Skip(reason, f"its result {why}: {self.target.name} computes it in float", by_setting)
            found = True
        return found

    def _asked_for(self, name: str) -> bool:
        return self._rules.get(name, ResolvedRules()).asked_for

    def _allowed(self) -> set[str]:
        """Layers that compute in INT8: allowed to, and every float they read can be quantized."""
        found = set()
        for layer in self.graph:
            name = layer.name
            if name in self._exact.layers and not self.connections.passes(name):
                self._skips.setdefault(name, Skip(SkipReason.ENGINE, f"what it computes {self._exact.why[name]}"))
            if (name in self._skips and not self._scales(name)) or self.connections.passes(name) or layer.kind == "input":
                continue
            if self.computed_with(name) != name:
                continue  # it joins them, or leaves them, with the layer that it folds into
            if layer.weighted or self._reads_quantizable(layer):
                found.add(name)
            else:
                self._skips[name] = Skip(SkipReason.ENGINE, "reads a tensor that can't be quantized")
        self._drop_followers(found)
        return found

    def _reads_quantizable(self, layer: Layer) -> bool:
        floats = self.connections.sources(layer.name)
        if operation_of_kind(layer.kind).mask is not None:  # it is added in float between the two matmuls
            floats = [source for source in floats if self.quantizable(source)]
        return bool(floats) and all(self.quantizable(source) for source in floats)

    def _scales(self, name: str) -> bool:
        """Whether a layer is a batch norm by itself, which is a convolution of each channel with one number."""
        layer = self.graph[name]
        if (
            layer.kind != "batch_norm"
            or not self.target.norms
            or self._skips[name].reason is not SkipReason.ENGINE
            or not has_statistics(layer)
        ):
            return False
        return len(layer.input_shapes) == 1 and len(layer.input_shapes[0]) in (3, 4, 5)

    def _drop_followers(self, int8: set[str]) -> None:
        """Take out the layers that multiply no weights and have float layers around them, or before them where that is what counts."""
        pending = [layer.name for layer in self.graph if layer.name in int8 and self._follows(layer.name)]
        while pending:
            self._drop_pending(int8, pending)
            pending = self._drop_islands(int8)

    def _drop_islands(self, int8: set[str]) -> list[str]:
        """Take out followers that are in INT8 for each other's sake alone (products and their sum, between floats); returns their neighbours."""
        followers = {layer.name: None for layer in self.graph if layer.name in int8 and self._follows(layer.name)}
        held: set[str] = set()
        pending = list(followers)
        while pending:
            name = pending.pop()
            if name in held or not self._is_held(name, int8, held):
                continue
            held.add(name)
            pending += [other for other in self._neighbours(name) if other in followers]
        islands = [name for name in followers if name not in held]
        for name in islands:
            self._leave(name, int8, "the layers before and after it run in float")
        return [other for name in islands for other in self._neighbours(name) if self._follows(other)]

    def _is_held(self, name: str, int8: set[str], held: set[str]) -> bool:
        """Whether a follower reads a result of another INT8 layer, or one reads its own; followers count among these if they are held."""
        readers = [reader for reader in self.connections.consumers(name) if reader in int8]
        if self._asked_for(name) or any(reader in held or not self._follows(reader) for reader in readers):
            return True
        sources = [self._groups.folded_into(source.layer) for source in self.connections.sources(name)]
        return any(one in int8 and self._gives_int8(one, name) and (one in held or not self._follows(one)) for one in sources)

    def _leave(self, name: str, int8: set[str], detail: str) -> None:
        int8.discard(name)
        self._skips.setdefault(name, Skip(SkipReason.ENGINE, detail))

    def _neighbours(self, name: str) -> set[str]:
        return {*self.connections.consumers(name), *(self.connections.origin[read].layer for read in self.connections.reads[name])}

    def _drop_pending(self, int8: set[str], pending: list[str]) -> None:
        while pending:
            name = pending.pop()
            if name not in int8 or self._asked_for(name):
                continue
            in_float = self._stream.keeps_float(TensorKey(name)) and self.graph[name].kind in self.target.elementwise_kinds
            if self._reads_int8(name, int8) and not in_float:
                continue
            # A clamp is what the rounding of its result does; a norm is no reason to round what it reads.
            only_behind = self.connections.category[name] is Category.CLAMP or self.graph[name].kind == "batch_norm"
            if not only_behind and not in_float and self._is_worth_it(name, int8):
                continue
            clamped = self._groups.clamped_by(name, int8) if self.connections.category[name] is Category.CLAMP else None
            unrounded = self._unrounded(name, int8) if clamped is not None else ""
            # The clamp is part of the rounding. Where the layer before it gives a result that is not rounded, it is one on floats.
            if clamped is not None and not (unrounded and self.graph[clamped].kind in self.target.float_outputs):
                continue
            read = any(reader in int8 for reader in self.connections.consumers(name))
            before = "the layer before it runs in float" if only_behind else "the layers before it run in float"
            detail = before if only_behind or read else "the layers before and after it run in float"
            self._leave(name, int8, "its result is in float (residual_stream: float)" if in_float else unrounded or detail)
            pending += [other for other in self._neighbours(name) if self._follows(other)]

    def _is_worth_it(self, name: str, int8: set[str]) -> bool:
        """Whether an INT8 layer reads what a layer gives, and the layer reads one tensor alone or one that is in INT8 anyway.

        A sum or a product of floats is computed in float, and its result is rounded: once instead of once for each of what it reads. So an RMSNorm and the
        gate of an MLP, between the residual stream and a product, round nothing of the stream. Measured by ``benchmarks/file_features.py sums``.
        """
        if not any(reader in int8 for reader in self.connections.consumers(name)):
            return False
        if reads_one(self.graph[name]):
            return True
        sources = [self._groups.folded_into(source.layer) for source in self.connections.sources(name)]
        return any(self.graph[one].kind == "input" or (one in int8 and self._gives_int8(one, name)) for one in sources)

    def _gives_int8(self, source: str, reader: str) -> bool:
        """Whether what an INT8 layer gives is in INT8 for the layer without weights that reads it, or in float unless something asks for INT8."""
        ends_group = self.connections.category[reader] is Category.CLAMP or self.graph[reader].kind == "batch_norm"
        return ends_group or self.target.gives_int8(self.graph[source].kind)

    def _unrounded(self, name: str, int8: set[str]) -> str:
        """Why a layer's result is not rounded in a file where it is made; empty if it may be."""
        if self._stream.keeps_float(TensorKey(name)):
            return "its result is in float (residual_stream: float)"
        needed = self._exact.reads_for_output(TensorKey(name))
        if needed:
            return f"its result is needed as it is, since it {needed}"
        if self._exact.reads(TensorKey(name)) and not any(reader in int8 for reader in self.connections.consumers(name)):
            return "its result is needed as it is, and no INT8 layer reads it"  # rounded at its readers, it would be rounded nowhere
        return ""

    def _follows(self, name: str) -> bool:
        kind = self.graph[name].kind
        return kind in self.target.elementwise_kinds or self.connections.category[name] is Category.CLAMP or kind == "batch_norm"

    def _reads_int8(self, name: str, int8: set[str]) -> bool:
        """Whether every float that a layer reads comes out of an INT8 layer in INT8 anyway, and gains nothing by being read as a float."""
        sources = self.connections.sources(name)
        loose = self.target.float_outputs | (
            self.target.followed_in_float if self.connections.category[name] is not Category.CLAMP else set()
        )
        makers = [self.computed_with(source.layer) for source in sources]
        return bool(makers) and all(maker in int8 and self.graph[maker].kind not in loose for maker in makers)
