"""From a graph and settings to a plan."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from lightning_cco.errors import CCOError
from lightning_cco.graph.layer import Layer
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.graph.ops import Category, operation_of_kind
from lightning_cco.quantization.connections import Connections
from lightning_cco.quantization.exact import UNSEEN, ExactReaders, Placement
from lightning_cco.quantization.groups import Groups, has_statistics
from lightning_cco.quantization.plan import Boundary, LayerDecision, QuantizationPlan, TensorSpec
from lightning_cco.quantization.residual import INT8_BITS, ResidualStream
from lightning_cco.quantization.rule_effects import warn_of_rules_without_effect
from lightning_cco.quantization.rules import ResolvedRules, apply_rules
from lightning_cco.quantization.skip_reasons import Skip, SkipReason
from lightning_cco.quantization.skips import find_skips
from lightning_cco.quantization.targets import TARGETS, Target
from lightning_cco.quantization.tensor_key import TensorKey
from lightning_cco.quantization.weight_groups import find_weight_groups
from lightning_cco.settings import Settings, load_settings


def plan_quantization(graph: LayerGraph, settings: Settings | None = None, suggestions: Iterable[str] = ()) -> QuantizationPlan:
    """Decide for every layer of a graph whether it is quantized.

    Args:
        graph: What `capture_graph` returned.
        settings: The recipe; `None` for the defaults.
        suggestions: Names of layers to skip because of their sensitivity.

    Raises:
        CCOError: A rule matches nothing, asks for something impossible, or contradicts another.

    Example:
        >>> import torch
        >>> from lightning_cco import capture_graph
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 8, 3), torch.nn.Flatten(), torch.nn.Linear(32, 2))
        >>> plan = plan_quantization(capture_graph(net, torch.ones(1, 1, 6, 6)))
        >>> sorted(plan.quantized)
        ['conv', 'conv_1', 'flatten', 'input_0', 'relu']
        >>> plan.skipped["linear"]
        'tail: the last layer with weights before an output, or after it'
    """
    settings = load_settings(settings)
    target = TARGETS[settings.deployment_settings.target_framework]
    said = apply_rules(graph, settings.layer_settings)
    suggestions = tuple(suggestions)
    unknown = [name for name in suggestions if name not in graph]
    if unknown:
        raise CCOError(
            f"suggestions: no layer is named {unknown}. Suggestions are layer names of this graph, such as {list(graph.names[:3])}."
        )
    groups = find_weight_groups(graph, settings.global_quantization_settings, said, target)
    skips, forced = find_skips(graph, settings, said, suggestions, target, groups)
    plan = _Planner(graph, settings, target, said, skips, suggestions, groups).plan()
    plan.forced = forced
    warn_of_rules_without_effect(plan, said)
    return plan


class _Planner:
    """Works out the tensors once it is known which layers may be quantized."""

    def __init__(
        self,
        graph: LayerGraph,
        settings: Settings,
        target: Target,
        said: dict[str, ResolvedRules],
        skips: dict[str, Skip],
        suggestions: tuple[str, ...],
        weight_groups: dict[str, int],
    ) -> None:
        self.weight_groups = weight_groups
        self.graph, self.settings, self.target, self.said, self.skips, self.suggestions = graph, settings, target, said, skips, suggestions
        self.connections = Connections(graph)
        self.groups = Groups(self.connections, target, skips)
        self.exact = ExactReaders(graph, {name for name, entry in said.items() if entry.asked_for})
        self.stream = ResidualStream(self.connections, settings.global_quantization_settings.residual_stream, said)

    def plan(self) -> QuantizationPlan:
        """Work it out."""
        self.skips.update({name: skip for name, skip in self.stream.skips().items() if name not in self.skips})
        self._find_fused()
        while self._leave_without_integer_outputs():
            self._find_fused()
        wanted = self._wanted()
        keys = [key for layer in self.graph for key in self.connections.outputs(layer.name) if key in wanted and self._quantizable(key)]
        placement = Placement(self.exact, self.int8)
        at_readers = {key: placement.place(key) for key in keys if self._is_rounded_at_readers(key)}
        tensors = {key: self._spec(key) for key in keys if at_readers.get(key, True)}
        tensors |= self._rounded_once_more(tensors, placement)
        at_readers |= {key: True for key in tensors if key.as_read}
        made = {key for key in tensors if key not in at_readers}
        rounded = self._rounded(made, placement)
        decisions = {layer.name: self._decision(layer, tensors, rounded, made) for layer in self.graph}
        return QuantizationPlan(
            self.graph,
            self.settings,
            decisions,
            tensors,
            self._boundaries(decisions),
            self.suggestions,
            self.connections.origin,
            self.fused_into,
            reads=placement.reads,
            at_readers=frozenset(at_readers),
        )

    def _find_fused(self) -> None:
        self.int8 = self._int8_layers()
        self.fused_into = self.groups.find(self.int8)
        self.fused_from = {after: before for before, after in self.fused_into.items()}

    def _leave_without_integer_outputs(self) -> bool:
        """Leave layers in float whose result is in float, if their engine computes them in INT8 only where it is rounded; returns whether there were any."""
        found = False
        for name in [name for name in self.int8 if self.graph[name].kind in self.target.integer_outputs and not self._asked_for(name)]:
            key = TensorKey(name)
            while key.layer in self.fused_into:
                key = TensorKey(self.fused_into[key.layer])
            by_setting = self.stream.keeps_float(key)
            needed = self.exact.reads_for_output(key)
            if not by_setting and not needed:
                continue
            reason = SkipReason.SETTING if by_setting else SkipReason.ENGINE
            reason = SkipReason.WEIGHT_ONLY if self.target.stores_weights(self.graph[name]) else reason
            why = "is in float (residual_stream: float)" if by_setting else f"is needed as it is, since it {needed}"
            self.skips[name] = Skip(reason, f"its result {why}: {self.target.name} computes it in float")
            found = True
        return found

    def _spec(self, key: TensorKey) -> TensorSpec:
        bits = self._activation_bits(key.layer)
        bits = INT8_BITS if self.stream.keeps_8_bits(key, bits) else bits
        return TensorSpec(key.layer, key.output, bits, self.target.symmetric_activations)

    def _rounded_once_more(self, tensors: Collection[TensorKey], placement: Placement) -> dict[TensorKey, TensorSpec]:
        """The residual stream's tensors of 8 bits, as the layers that multiply read them."""
        found = {}
        multiplying = (Category.WEIGHTED, Category.MATMUL)
        others = Placement(self.exact, {name for name in self.int8 if self.connections.category[name] in multiplying})
        for key in tensors:
            bits = self._activation_bits(key.layer)
            spec = TensorSpec(key.layer, key.output, bits, self.target.symmetric_activations, as_read=True)
            if self.stream.keeps_8_bits(key, bits) and others.place(key, spec.key):
                found[spec.key] = spec
        for name, reads in others.reads.items():
            placement.reads.setdefault(name, {}).update(reads)
        return found

    def _asked_for(self, name: str) -> bool:
        return self.said.get(name, ResolvedRules()).asked_for

    def _is_rounded_at_readers(self, key: TensorKey) -> bool:
        layer = self.graph[key.layer]
        return layer.kind in UNSEEN or layer.outside or self.exact.reads(key) or self.stream.keeps_float(key)

    def _rounded(self, made: set[TensorKey], placement: Placement) -> set[str]:
        """Layers that pass rounded values on."""
        carried, found = set(made), set()
        for layer in self.graph:
            reads = self.connections.reads[layer.name] if self.connections.passes(layer.name) else []
            if reads and (reads[0] in carried or 0 in placement.reads.get(layer.name, {})):
                found.add(layer.name)
                carried.update(self.connections.outputs(layer.name))
        return found

    def _quantizable(self, key: TensorKey) -> bool:
        layer = self.graph[key.layer]
        if layer.kind == "input" and layer.name in self.skips:
            return False
        return self.connections.is_float(key) and (not layer.quantizable_outputs or layer.quantizable_outputs[key.output])

    def _int8_layers(self) -> set[str]:
        """Layers that compute in INT8: allowed to, and every float they read can be quantized."""
        found = set()
        for layer in self.graph:
            name = layer.name
            if name in self.exact.layers and not self.connections.passes(name):
                self.skips.setdefault(name, Skip(SkipReason.ENGINE, f"what it computes {self.exact.why[name]}"))
            if (name in self.skips and not self._scales(name)) or self.connections.passes(name) or layer.kind == "input":
                continue
            if layer.weighted or self._reads_quantizable(layer):
                found.add(name)
            else:
                self.skips[name] = Skip(SkipReason.ENGINE, "reads a tensor that can't be quantized")
        self._drop_followers(found)
        return found

    def _reads_quantizable(self, layer: Layer) -> bool:
        floats = self.connections.sources(layer.name)
        if operation_of_kind(layer.kind).mask is not None:  # it is added in float between the two matmuls
            floats = [source for source in floats if self._quantizable(source)]
        return bool(floats) and all(self._quantizable(source) for source in floats)

    def _scales(self, name: str) -> bool:
        """Whether a layer is a batch norm by itself, which is a convolution of each channel with one number."""
        layer = self.graph[name]
        if (
            layer.kind != "batch_norm"
            or not self.target.norms
            or self.skips[name].reason is not SkipReason.ENGINE
            or not has_statistics(layer)
        ):
            return False
        return len(layer.input_shapes) == 1 and len(layer.input_shapes[0]) in (3, 4, 5)

    def _drop_followers(self, int8: set[str]) -> None:
        """Take out the layers that multiply no weights and have float layers around them, or before them where that is what counts."""
        pending = [layer.name for layer in self.graph if layer.name in int8 and self._follows(layer.name)]
        while pending:
            name = pending.pop()
            if name not in int8 or self._asked_for(name):
                continue
            in_float = self.stream.keeps_float(TensorKey(name)) and self.graph[name].kind in self.target.elementwise_kinds
            if self._reads_int8(name, int8) and not in_float:
                continue
            # A clamp is what the rounding of its result does; a norm is no reason to round what it reads.
            only_behind = self.connections.category[name] is Category.CLAMP or self.graph[name].kind == "batch_norm"
            if not only_behind and not in_float and any(reader in int8 for reader in self.connections.consumers(name)):
                continue
            if self.connections.category[name] is Category.CLAMP and self.groups.ends_at(name, int8):
                continue
            int8.discard(name)
            detail = "a float layer is before it" if only_behind else "float layers are before and behind it"
            detail = "its result is in float (residual_stream: float)" if in_float else detail
            self.skips.setdefault(name, Skip(SkipReason.ENGINE, detail))
            neighbours = {
                *self.connections.consumers(name),
                *(self.connections.origin[read].layer for read in self.connections.reads[name]),
            }
            pending += [other for other in neighbours if self._follows(other)]

    def _follows(self, name: str) -> bool:
        kind = self.graph[name].kind
        return kind in self.target.elementwise_kinds or self.connections.category[name] is Category.CLAMP or kind == "batch_norm"

    def _reads_int8(self, name: str, int8: set[str]) -> bool:
        """Whether every float that a layer reads comes out of an INT8 layer in INT8 anyway, and gains nothing by being read as a float."""
        sources = self.connections.sources(name)
        loose = self.target.float_outputs | (
            self.target.followed_in_float if self.connections.category[name] is not Category.CLAMP else set()
        )
        return bool(sources) and all(source.layer in int8 and self.graph[source.layer].kind not in loose for source in sources)

    def _float_output(self, name: str) -> bool:
        """Whether the engine hands a layer's result over in float. Behind a product with a clamp it does not: the rounding is the clamp."""
        return self.graph[name].kind in self.target.float_outputs

    def _wanted(self) -> set[TensorKey]:
        """Tensors that an INT8 layer makes (at the end of its group) or reads (at their origin)."""
        makers = {name for name in self.int8 - set(self.fused_into) if not self._float_output(name)}
        made = (key for name in makers for key in self.connections.outputs(name))
        wanted = {key for key in made if key.output == 0 or key in self.connections.readers}
        wanted |= {self.connections.origin[read] for name in self.int8 for read in self.connections.reads[name]}
        return wanted - {TensorKey(name) for name in self.fused_into}

    def _activation_bits(self, name: str) -> int:
        """The layer's own rule, else that of the group it ends, else the global value."""
        said = self.said.get(name, ResolvedRules()).activations_num_bits
        while said is None:
            before = self.fused_from.get(name)
            if before is None:
                return self.settings.global_quantization_settings.activations_num_bits
            name = before
            said = self.said.get(name, ResolvedRules()).activations_num_bits
        return said

    def _decision(
        self, layer: Layer, made: Mapping[TensorKey, TensorSpec], rounded: set[str], at_producers: Collection[TensorKey]
    ) -> LayerDecision:
        name = layer.name
        own = made[TensorKey(name)].num_bits if TensorKey(name) in made else None
        as_read = TensorKey(name, as_read=True)
        read = made[as_read].num_bits if as_read in made else None
        weights = None
        if layer.weighted:
            said = self.said.get(name, ResolvedRules()).weights_num_bits
            weights = said if said is not None else self.settings.global_quantization_settings.weights_num_bits
            alone = name in self.skips and self.skips[name].reason is SkipReason.WEIGHT_ONLY
            # An engine may multiply a rounded tensor with integer weights on integers, whatever the plan says (OpenVINO's transposed convolution).
            on_floats = name in self.weight_groups or all(
                self.connections.origin[read] not in at_producers for read in self.connections.reads[name]
            )
            if not alone or not on_floats:
                weights = self.target.weight_bits(layer, weights, self.settings.deployment_settings.vnni)
        if name in self.skips:
            skip = self.skips[name]
            if skip.reason is not SkipReason.WEIGHT_ONLY:
                return LayerDecision(False, skip.reason, skip.detail, None, own, read_num_bits=read)
            return LayerDecision(False, skip.reason, skip.detail, weights, own, self.weight_groups.get(name), read)
        if layer.kind == "input" and TensorKey(name) not in made:
            return LayerDecision(False, SkipReason.ENGINE, "no INT8 layer reads it")
        if self.connections.passes(name) and name not in rounded:
            return LayerDecision(False, SkipReason.ENGINE, "the tensor it passes on is in float on both sides")
        return LayerDecision(True, None, "", weights, own, read_num_bits=read)

    def _boundaries(self, decisions: dict[str, LayerDecision]) -> list[Boundary]:
        found: dict[Boundary, None] = {}
        for edge in self.graph.edges:
            source, destination = self.connections.origin[TensorKey(edge.source, edge.source_output)].layer, edge.destination
            if (
                self.connections.passes(destination)
                or self.graph[destination].kind == "output"
                or not self.connections.is_float(TensorKey(source))
            ):
                continue
            before, after = decisions[source].quantized, decisions[destination].quantized
            if before != after:
                found[Boundary(source, destination, "INT8 → float" if before else "float → INT8")] = None
        return list(found)
