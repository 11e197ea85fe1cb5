"""From a graph and settings to a plan: which tensors are rounded where, and what is decided of each layer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from lightning_cco.errors import CCOError
from lightning_cco.graph.layer import Layer
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.graph.ops import Category
from lightning_cco.quantization.connections import Connections
from lightning_cco.quantization.dynamic_activations import find_dynamic
from lightning_cco.quantization.exact_readers import UNSEEN, ExactReaders, Placement
from lightning_cco.quantization.int8_layers import Int8Layers
from lightning_cco.quantization.plan import Boundary, LayerDecision, QuantizationPlan, TensorSpec
from lightning_cco.quantization.ranges import FEW_BITS
from lightning_cco.quantization.residual_stream import INT8_BITS, ResidualStream
from lightning_cco.quantization.rule_effects import warn_of_rules_without_effect
from lightning_cco.quantization.rules import ResolvedRules, apply_rules
from lightning_cco.quantization.setting_effects import warn_of_settings_without_effect
from lightning_cco.quantization.skip_reasons import Skip, SkipReason
from lightning_cco.quantization.skips import find_skips
from lightning_cco.quantization.targets import TARGETS, Target
from lightning_cco.quantization.tensor_key import TensorKey
from lightning_cco.quantization.weight_groups import find_weight_groups, find_with_zero_points
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
    rules = apply_rules(graph, settings.layer_settings)
    suggestions = tuple(suggestions)
    unknown = [name for name in suggestions if name not in graph]
    if unknown:
        raise CCOError(
            f"suggestions: no layer is named {unknown}. Suggestions are layer names of this graph, such as {list(graph.names[:3])}."
        )
    groups = find_weight_groups(graph, settings.global_quantization_settings, rules, target)
    dynamic = find_dynamic(graph, settings.global_quantization_settings, rules, target, groups)
    skips, forced = find_skips(graph, settings, rules, suggestions, target, groups, dynamic)
    with_zeros = find_with_zero_points(graph, settings.global_quantization_settings, rules, target, skips)
    planner = _Planner(graph, settings, target, rules, skips, suggestions, groups, with_zeros, dynamic)
    plan = planner.plan()
    plan.forced = forced
    warn_of_rules_without_effect(plan, rules)
    warn_of_settings_without_effect(plan, planner.stream)
    return plan


_MULTIPLYING = (Category.WEIGHTED, Category.MATMUL)
_AVERAGES = frozenset({"adaptive_avg_pool", "avg_pool", "mean"})
_OF_AVERAGES = FEW_BITS - 1
"""Up to how many bits averages are like products: of 2, what is averaged was no better off with 8; of 4 it was (`benchmarks/fashion.py`)."""


class _Planner:
    """Works out the tensors once it is known which layers may be quantized."""

    def __init__(
        self,
        graph: LayerGraph,
        settings: Settings,
        target: Target,
        rules: dict[str, ResolvedRules],
        skips: dict[str, Skip],
        suggestions: tuple[str, ...],
        weight_groups: dict[str, int],
        with_zero_points: set[str],
        dynamic: dict[str, int],
    ) -> None:
        self.weight_groups, self.with_zero_points, self.dynamic = weight_groups, with_zero_points, dynamic
        self.graph, self.settings, self.target, self.rules, self.skips, self.suggestions = (
            graph,
            settings,
            target,
            rules,
            skips,
            suggestions,
        )
        self.connections = Connections(graph)
        self.exact = ExactReaders(graph, {name for name, entry in rules.items() if entry.asked_for})
        self.stream = ResidualStream(self.connections, settings.global_quantization_settings.residual_stream, rules)

    def plan(self) -> QuantizationPlan:
        """Work it out."""
        self.skips.update({name: skip for name, skip in self.stream.skips().items() if name not in self.skips})
        in_rows = {*self.weight_groups, *self.with_zero_points}
        layers = Int8Layers(self.connections, self.target, self.rules, self.skips, self.exact, self.stream, in_rows)
        self.int8, self.fused_into, self.computed_with = layers.names, layers.fused_into, layers.computed_with
        self.fused_from = {after: before for before, after in self.fused_into.items()}
        wanted = self._wanted()
        keys = [key for layer in self.graph for key in self.connections.outputs(layer.name) if key in wanted and layers.quantizable(key)]
        placement = Placement(self.exact, self.int8)
        at_readers = {key: placement.place(key) for key in keys if self._is_rounded_at_readers(key)}
        tensors = {key: self._spec(key) for key in keys if at_readers.get(key, True)}
        tensors |= self._rounded_once_more(tensors, placement)
        at_readers |= {key: True for key in tensors if key.as_read}
        made = {key for key in tensors if key not in at_readers}
        rounded = self._rounded(made, placement)
        decisions = {layer.name: self._decision(layer, tensors, rounded, made) for layer in self.graph}
        kept = {key.layer for key in tensors if self._keeps_8_bits(TensorKey(key.layer, key.output))}
        kept |= {
            name for name, own in decisions.items() if own.weights_num_bits is not None and self._weights_keep_8_bits(self.graph[name])
        }
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
            kept_at_8_bits=tuple(name for name in self.graph.names if name in kept),
            folded=layers.folded,
        )

    def _spec(self, key: TensorKey) -> TensorSpec:
        bits = self._activation_bits(key.layer)
        bits = INT8_BITS if self.stream.keeps_8_bits(key, bits) or self._keeps_8_bits(key) else bits
        return TensorSpec(key.layer, key.output, bits, self.target.symmetric_activations)

    def _keeps_8_bits(self, key: TensorKey) -> bool:
        """Whether the few bits that the settings say for all would only lose accuracy.

        They save nothing where no layer sums integers of a tensor up. What a model is given is as fine as 8 bits (pixels) or finer, and at its first layer
        alone (Choi et al., "PACT", 2018; Esser et al., "LSQ", 2020).
        """
        bits = self.settings.global_quantization_settings.activations_num_bits
        if bits > FEW_BITS or self._ruled_bits(key.layer) is not None or self.stream.keeps_8_bits(key, bits):
            return False
        if key.layer in self.exact.of_inputs:
            return True
        return not self._summed_up(key, bits) and not self.stream.keeps_few_bits(key)

    def _summed_up(self, key: TensorKey, bits: int) -> bool:
        """Whether a layer that sums integers up reads a tensor."""
        readers = [name for name in self.connections.consumers_of(key) if name in self.int8]
        averaged = bits <= _OF_AVERAGES and any(self.graph[name].kind in _AVERAGES for name in readers)
        return averaged or any(self.connections.category[name] in _MULTIPLYING for name in readers)

    def _rounded_once_more(self, tensors: Collection[TensorKey], placement: Placement) -> dict[TensorKey, TensorSpec]:
        """The residual stream's tensors of 8 bits, as the layers that multiply read them."""
        found = {}
        others = Placement(self.exact, {name for name in self.int8 if self.connections.category[name] in _MULTIPLYING})
        for key in tensors:
            bits = self._activation_bits(key.layer)
            spec = TensorSpec(key.layer, key.output, bits, self.target.symmetric_activations, as_read=True)
            if self.stream.keeps_8_bits(key, bits) and others.place(key, spec.key):
                found[spec.key] = spec
        for name, reads in others.reads.items():
            placement.reads.setdefault(name, {}).update(reads)
        return found

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

    def _float_output(self, name: str) -> bool:
        """Whether the engine gives a layer's result in float without a conversion.

        After a product with a clamp it does not: the rounding is the clamp. Left in float, ONNX Runtime 1.32 fuses ReLU with the linear layer before it into
        one operator on floats (`python benchmarks/file_features.py clamps`).
        """
        return self.graph[self.computed_with(name)].kind in self.target.float_outputs

    def _wanted(self) -> set[TensorKey]:
        """Tensors that an INT8 layer makes (at the end of its group) or reads (at their origin)."""
        makers = {name for name in self.int8 - set(self.fused_into) if not self._float_output(name)}
        made = (key for name in makers for key in self.connections.outputs(name))
        wanted = {key for key in made if key.output == 0 or key in self.connections.readers}
        wanted |= {self.connections.origin[read] for name in self.int8 for read in self.connections.reads[name]}
        return wanted - {TensorKey(name) for name in self.fused_into}

    def _activation_bits(self, name: str) -> int:
        """What the rules say of a layer's result, else the global value."""
        bits = self._ruled_bits(name)
        return self.settings.global_quantization_settings.activations_num_bits if bits is None else bits

    def _ruled_bits(self, name: str) -> int | None:
        """The layer's own rule, else that of the group it ends."""
        bits = self.rules.get(name, ResolvedRules()).activations_num_bits
        while bits is None and name in self.fused_from:
            name = self.fused_from[name]
            bits = self.rules.get(name, ResolvedRules()).activations_num_bits
        return bits

    def _weight_bits(self, layer: Layer) -> int:
        """What the rules say of a layer's weights, else the global value, or 8 where few bits would cost most."""
        bits = self.rules.get(layer.name, ResolvedRules()).weights_num_bits
        if bits is not None:
            return bits
        return INT8_BITS if self._weights_keep_8_bits(layer) else self.settings.global_quantization_settings.weights_num_bits

    def _weights_keep_8_bits(self, layer: Layer) -> bool:
        """Whether a layer is a convolution of what the model is given, whose weights keep 8 bits as what they read does."""
        few = self.settings.global_quantization_settings.weights_num_bits <= FEW_BITS
        if not few or layer.kind != "conv" or self.rules.get(layer.name, ResolvedRules()).weights_num_bits is not None:
            return False
        sources = self.connections.sources(layer.name)
        return bool(sources) and all(source.layer in self.exact.of_inputs for source in sources)

    def _decision(
        self, layer: Layer, made: Mapping[TensorKey, TensorSpec], rounded: set[str], at_producers: Collection[TensorKey]
    ) -> LayerDecision:
        name = layer.name
        own = made[TensorKey(name)].num_bits if TensorKey(name) in made else None
        as_read = TensorKey(name, as_read=True)
        read = made[as_read].num_bits if as_read in made else None
        weights = None
        if layer.weighted:
            weights = self._weight_bits(layer)
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
            group, symmetric = self.weight_groups.get(name), name not in self.with_zero_points
            return LayerDecision(
                False,
                skip.reason,
                skip.detail,
                weights,
                own,
                group,
                read,
                symmetric,
                self.dynamic.get(name),
                weight_only_by_setting=skip.by_setting,
            )
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
