"""Which layers and which tensors are quantized, with how many bits, and why not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lightning_cco.errors import CCOError
from lightning_cco.graph.layer import Layer
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.graph.ops import Category, operation_of_kind
from lightning_cco.quantization.exact import FLOATS, UNSEEN, ExactReaders, Placement
from lightning_cco.quantization.rules import Said, apply_rules
from lightning_cco.quantization.skips import WEIGHT_ONLY, find_skips, warn_of_bits_for_nothing
from lightning_cco.quantization.targets import TARGETS, Target
from lightning_cco.settings import LayerRule, Settings, load_settings


@dataclass(frozen=True)
class LayerDecision:
    """What is done to one layer.

    Attributes:
        quantized: Whether it runs in INT8 (or fewer bits).
        reason: Empty when quantized; else ``tail``, ``setting``, ``suggestion``, ``rule``, ``weight-only``, ``integer``, ``unsupported`` or ``output``.
        detail: The reason in a sentence.
        weights_num_bits: Bits of its weight, also where only that is quantized; `None` without a quantized weight.
        activations_num_bits: Bits of the quantizer on its output; `None` if it has none of its own.
    """

    quantized: bool
    reason: str = ""
    detail: str = ""
    weights_num_bits: int | None = None
    activations_num_bits: int | None = None

    @property
    def weight_only(self) -> bool:
        """Whether its weights are integers in the file, but it is computed in float."""
        return not self.quantized and self.weights_num_bits is not None


@dataclass(frozen=True)
class Boundary:
    """A tensor that changes between float and INT8 on its way.

    Attributes:
        source: The layer that makes it.
        destination: The layer that reads it.
        direction: ``float → INT8`` or ``INT8 → float``.
    """

    source: str
    destination: str
    direction: str


@dataclass(frozen=True)
class TensorSpec:
    """A fake-quantized tensor: who makes it, and its format."""

    layer: str
    output: int
    num_bits: int
    symmetric: bool

    @property
    def key(self) -> str:
        """Name of its quantizer: the layer's, with the output's number behind it from the second on."""
        return f"{self.layer}:{self.output}" if self.output else self.layer


@dataclass
class QuantizationPlan:
    """Every layer's decision and every quantized tensor.

    Attributes:
        graph: The layer graph.
        settings: The settings that it follows.
        decisions: One per layer, outputs included.
        tensors: The fake-quantized tensors by quantizer name.
        boundaries: Where tensors pass between float and INT8.
        suggestions: Layers skipped because of their sensitivity.
        origins: For every tensor, by layer and output number, the one it got its values from, seen through value-preserving layers.
        groups: For each layer inside a fused group, the next one in it.
        forced: Layers that run in INT8 only because a rule asks for it by name.
        reads: For each layer, by the number of its input, the name of the quantizer that rounds that input.
        at_readers: Names of the quantizers that stand there instead of behind the layer that makes the tensor, which somebody needs as it is.
        quantized: Layers that run in INT8.
        weight_only: Layers in float with integer weights.
        skipped: Why the others do not run in INT8, those with integer weights included.
    """

    graph: LayerGraph
    settings: Settings
    decisions: dict[str, LayerDecision]
    tensors: dict[str, TensorSpec]
    boundaries: list[Boundary]
    suggestions: tuple[str, ...] = ()
    origins: dict[tuple[str, int], tuple[str, int]] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    forced: frozenset[str] = frozenset()
    reads: dict[str, dict[int, str]] = field(default_factory=dict)
    at_readers: frozenset[str] = frozenset()
    quantized: set[str] = field(init=False)
    weight_only: set[str] = field(init=False)
    skipped: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.quantized = {name for name, decision in self.decisions.items() if decision.quantized}
        self.weight_only = {name for name, decision in self.decisions.items() if decision.weight_only}
        self.skipped = {
            name: f"{decision.reason}: {decision.detail}" if decision.detail else decision.reason
            for name, decision in self.decisions.items()
            if not decision.quantized and decision.reason != "output"
        }

    def rounds(self, key: str) -> bool:
        """Whether a tensor, by the name of its quantizer, is rounded where it is made."""
        return key in self.tensors and key not in self.at_readers

    @property
    def counted(self) -> int:
        """Number of layers of the deployed model: outputs are no layers, dropout is not deployed."""
        return sum(self.counts(name) for name in self.graph.names)

    def counts(self, name: str) -> bool:
        """Whether a layer is one of the deployed model."""
        kind = self.graph[name].kind
        return kind != "output" and operation_of_kind(kind).category is not Category.IDENTITY

    def resolved_settings(self) -> Settings:
        """Settings that name every layer with its decision; planning with them gives this plan again, with the reason ``setting`` for ``tail``."""
        settings = load_settings(self.settings)
        settings.global_quantization_settings.skip_tail_quantization = False
        settings.layer_settings = []
        bits = self.output_bits()
        for layer in self.graph:
            if layer.kind == "output":
                continue
            decision = self.decisions[layer.name]
            skip = True if not (decision.quantized or decision.weight_only) else False if layer.name in self.forced else None
            rule = LayerRule(skip, weights_num_bits=decision.weights_num_bits, activations_num_bits=bits.get(layer.name), match=layer.name)
            settings.layer_settings.append(rule)
        return settings

    def output_bits(self) -> dict[str, int]:
        """Bits of each layer's fake-quantized output, whether the layer itself runs in INT8 or only what reads it."""
        return {spec.layer: spec.num_bits for spec in self.tensors.values()}


def plan_quantization(graph: LayerGraph, settings: Settings | None = None, suggestions: Iterable[str] = ()) -> QuantizationPlan:
    """Decide for every layer of a graph whether it is quantized.

    Args:
        graph: What `capture_graph` returned.
        settings: The recipe; `None` for the defaults.
        suggestions: Names of layers to skip because of their sensitivity.

    Raises:
        CCOError: A rule matches nothing, asks for something impossible, or contradicts another.
    """
    settings = load_settings(settings)
    target = TARGETS[settings.deployment_settings.target_framework]
    said = apply_rules(graph, settings.layer_settings)
    warn_of_bits_for_nothing(graph, settings.layer_settings)
    suggestions = tuple(suggestions)
    unknown = [name for name in suggestions if name not in graph]
    if unknown:
        raise CCOError(
            f"suggestions: no layer is named {unknown}. Suggestions are layer names of this graph, such as {list(graph.names[:3])}."
        )
    skips, forced = find_skips(graph, settings, said, suggestions, target)
    plan = _Planner(graph, settings, target, said, skips, suggestions).plan()
    plan.forced = forced
    return plan


class _Planner:
    """Works out the tensors once it is known which layers may be quantized."""

    def __init__(
        self,
        graph: LayerGraph,
        settings: Settings,
        target: Target,
        said: dict[str, Said],
        skips: dict[str, tuple[str, str]],
        suggestions: tuple[str, ...],
    ) -> None:
        self.graph, self.settings, self.target, self.said, self.skips, self.suggestions = graph, settings, target, said, skips, suggestions
        self.category = {layer.name: operation_of_kind(layer.kind).category for layer in graph}
        self.reads: dict[str, list[tuple[str, int]]] = {name: [] for name in graph.names}
        self.readers: dict[tuple[str, int], list[str]] = {}
        for edge in graph.edges:
            self.reads[edge.destination].append((edge.source, edge.source_output))
            self.readers.setdefault((edge.source, edge.source_output), []).append(edge.destination)

    def plan(self) -> QuantizationPlan:
        graph = self.graph
        self.origin = self._origins()
        self.exact = ExactReaders(graph, {name for name, said in self.said.items() if said.asked_for})
        self.int8 = self._int8_layers()
        self.fused_into = self._groups()
        self.fused_from = {after: before for before, after in self.fused_into.items()}
        wanted = self._wanted()
        tensors: dict[str, TensorSpec] = {}
        for layer in graph:
            for output in range(len(layer.output_dtypes)):
                key = (layer.name, output)
                if key in wanted and self._quantizable(key):
                    spec = TensorSpec(layer.name, output, self._activation_bits(layer.name), self.target.symmetric_activations)
                    tensors[spec.key] = spec
        placement = Placement(self.exact, self.int8)
        at_readers = {
            key: placement.place((spec.layer, spec.output), key)
            for key, spec in tensors.items()
            if graph[spec.layer].kind in UNSEEN or graph[spec.layer].outside or self.exact.reads((spec.layer, spec.output))
        }
        tensors = {key: spec for key, spec in tensors.items() if at_readers.get(key, True)}
        made = {(spec.layer, spec.output) for spec in tensors.values()}
        rounded = self._rounded({(s.layer, s.output) for key, s in tensors.items() if key not in at_readers}, placement)
        decisions = {layer.name: self._decision(layer, made, rounded) for layer in graph}
        return QuantizationPlan(
            graph,
            self.settings,
            decisions,
            tensors,
            self._boundaries(decisions),
            self.suggestions,
            self.origin,
            self.fused_into,
            reads=placement.reads,
            at_readers=frozenset(at_readers),
        )

    def _rounded(self, made: set[tuple[str, int]], placement: Placement) -> set[str]:
        """Layers that pass rounded values on."""
        carried, found = set(made), set()
        for layer in self.graph:
            reads = self.reads[layer.name] if self._passes(layer.name) else []
            if reads and (reads[0] in carried or 0 in placement.reads.get(layer.name, {})):
                found.add(layer.name)
                carried |= {(layer.name, output) for output in range(len(layer.output_dtypes))}
        return found

    def _passes(self, name: str) -> bool:
        return self.category[name] in (Category.PRESERVE, Category.IDENTITY)

    def _origins(self) -> dict[tuple[str, int], tuple[str, int]]:
        """For every tensor the one it got its values from, seen through value-preserving layers."""
        origin: dict[tuple[str, int], tuple[str, int]] = {}
        for layer in self.graph:
            reads = self.reads[layer.name]
            for output in range(max(1, len(layer.output_dtypes))):
                key = (layer.name, output)
                origin[key] = origin.get(reads[0], reads[0]) if self._passes(layer.name) and reads else key
        return origin

    def _quantizable(self, key: tuple[str, int]) -> bool:
        layer = self.graph[key[0]]
        if layer.kind == "input" and layer.name in self.skips:
            return False
        return self._is_float(key) and (not layer.quantizable_outputs or layer.quantizable_outputs[key[1]])

    def _int8_layers(self) -> set[str]:
        """Layers that compute in INT8: allowed to, and every float they read can be quantized."""
        found = set()
        for layer in self.graph:
            name = layer.name
            if name in self.exact.layers and not self._passes(name):
                self.skips.setdefault(name, ("rule", "what it computes serves an index, a mask or a step, which rounding would change"))
            if (name in self.skips and not self._scales(name)) or self._passes(name) or layer.kind == "input":
                continue
            sources = [self.origin[read] for read in self.reads[name]]
            floats = [s for s in sources if self._is_float(s)]
            if layer.kind == "scaled_dot_product_attention":  # its mask is added in float between the two matmuls
                floats = [s for s in floats if self._quantizable(s)]
            if not layer.weighted and (not floats or not all(self._quantizable(s) for s in floats)):
                self.skips[name] = ("rule", "reads a tensor that can't be quantized")
                continue
            found.add(name)
        self._drop_followers(found)
        return found

    def _scales(self, name: str) -> bool:
        """Whether a layer is a batch norm by itself, which is a convolution of each channel with one number."""
        layer = self.graph[name]
        if layer.kind != "batch_norm" or not self.target.norms or self.skips[name][0] != "rule" or not _has_statistics(layer):
            return False
        return len(layer.input_shapes) == 1 and len(layer.input_shapes[0]) in (3, 4, 5)

    def _drop_followers(self, int8: set[str]) -> None:
        """Take out the layers that multiply no weights and have float layers around them, or before them where that is what counts."""
        pending = [layer.name for layer in self.graph if layer.name in int8 and self._follows(layer.name)]
        while pending:
            name = pending.pop()
            if name not in int8 or self.said.get(name, Said()).asked_for or self._reads_int8(name, int8):
                continue
            # A clamp is what the rounding of its result does; a norm is no reason to round what it reads.
            only_behind = self.category[name] is Category.CLAMP or self.graph[name].kind == "batch_norm"
            if not only_behind and any(reader in int8 for reader in self._consumers(name)):
                continue
            if self.category[name] is Category.CLAMP and self._ends_group(name, int8):
                continue
            int8.discard(name)
            detail = "a float layer is before it" if only_behind else "float layers are before and behind it"
            self.skips.setdefault(name, ("rule", detail))
            neighbours = {*self._consumers(name), *(self.origin[read][0] for read in self.reads[name])}
            pending += [other for other in neighbours if self._follows(other)]

    def _follows(self, name: str) -> bool:
        kind = self.graph[name].kind
        return kind in self.target.followers or self.category[name] is Category.CLAMP or kind == "batch_norm"

    def _ends_group(self, name: str, int8: set[str]) -> bool:
        """Whether a clamp is all that reads an INT8 layer's result, if need be behind a batch norm."""
        source = self.reads[name][0][0] if len(self.reads[name]) == 1 else None
        if source is not None and self.graph[source].kind == "batch_norm" and source not in int8 and len(self.reads[source]) == 1:
            before = self.reads[source][0][0]
            source = before if self._only_reader(source) == name and self._folds(before, source) else None
            return source is not None and source in int8
        return source is not None and source in int8 and self._only_reader(source) == name

    def _folds(self, name: str, norm: str) -> bool:
        """Whether a batch norm's factors go into the weights of the layer before it: its channels are that layer's."""
        layer, after = self.graph[name], self.graph[norm]
        if layer.kind not in ("conv", "conv_transpose", "linear") or self._only_reader(name) != norm or not layer.output_shapes:
            return False
        if after.kind != "batch_norm" or not _has_statistics(after) or self.skips.get(norm, ("rule",))[0] != "rule":
            return False
        if layer.kind == "conv_transpose" and layer.attributes.get("groups", 1) != 1:
            return False  # groups share the scale of a channel, but not the norm's factor
        size, kernel = len(layer.output_shapes[0]), layer.attributes.get("kernel_size")
        weight = layer.attributes.get("weight_shape")
        wanted = (
            2
            if layer.kind == "linear"
            else len(kernel) + 2
            if isinstance(kernel, tuple)
            else len(weight)
            if isinstance(weight, tuple)
            else size
        )
        return size == wanted and after.input_shapes[:1] == layer.output_shapes[:1]

    def _reads_int8(self, name: str, int8: set[str]) -> bool:
        """Whether every float that a layer reads comes out of an INT8 layer in INT8 anyway."""
        sources = [self.origin[read] for read in self.reads[name] if self._is_float(self.origin[read])]
        return bool(sources) and all(source[0] in int8 and not self._float_output(source[0]) for source in sources)

    def _float_output(self, name: str) -> bool:
        """Whether the engine hands a layer's result over in float. Behind a product with a clamp it does not: the rounding is the clamp."""
        return self.graph[name].kind in self.target.float_outputs

    def _consumers(self, name: str) -> list[str]:
        """The layers that read what a layer makes, seen through those that only pass values on."""
        found, pending = [], [name]
        while pending:
            one = pending.pop()
            for output in range(max(1, len(self.graph[one].output_dtypes))):
                for reader in self.readers.get((one, output), []):
                    if self._passes(reader):
                        pending.append(reader)
                    else:
                        found.append(reader)
        return found

    def _is_float(self, key: tuple[str, int]) -> bool:
        dtypes = self.graph[key[0]].output_dtypes
        return key[1] < len(dtypes) and dtypes[key[1]] in FLOATS

    def _groups(self) -> dict[str, str]:
        """For each layer inside a fused group, the next one in it: conv → batch norm → activation is quantized at its end."""
        fused: dict[str, str] = {}
        for layer in self.graph:
            weight_only = layer.name in self.skips and self.skips[layer.name][0] == WEIGHT_ONLY
            if (layer.name not in self.int8 and not weight_only) or layer.kind in ("lstm", "gru", "rnn", "embedding", "embedding_bag"):
                continue
            end = layer.name
            norm = self._only_reader(end)
            if norm is not None and self._folds(end, norm):
                if weight_only:
                    self.int8.discard(norm)
                    self.skips[norm] = ("rule", f"it folds into '{end}', which {self.target.name} computes in float")
                else:
                    self.skips.pop(norm, None)
                    self.int8.add(norm)
                fused[end] = norm
                end = norm
            clamp = self._only_reader(end)
            if end in self.int8 and clamp in self.int8 and self.category[clamp] is Category.CLAMP and len(self.reads[clamp]) == 1:
                fused[end] = clamp
        for name in self.int8:
            self.skips.pop(name, None)
        return fused

    def _only_reader(self, name: str) -> str | None:
        readers = self.readers.get((name, 0), [])
        return readers[0] if len(readers) == 1 and len(self.graph[name].output_dtypes) == 1 else None

    def _wanted(self) -> set[tuple[str, int]]:
        """Tensors that an INT8 layer makes (at the end of its group) or reads (at their origin)."""
        makers = {name for name in self.int8 - set(self.fused_into) if not self._float_output(name)}
        wanted = {(name, output) for name in makers for output in range(len(self.graph[name].output_dtypes))}
        wanted = {key for key in wanted if key[1] == 0 or key in self.readers}
        inner = {(name, 0) for name in self.fused_into}
        for name in self.int8:
            wanted |= {self.origin[read] for read in self.reads[name]}
        return wanted - inner

    def _activation_bits(self, name: str) -> int:
        """The layer's own rule, else that of the group it ends, else the global value."""
        said = self.said.get(name, Said()).activations_num_bits
        while said is None:
            before = self.fused_from.get(name)
            if before is None:
                return self.settings.global_quantization_settings.activations_num_bits
            name = before
            said = self.said.get(name, Said()).activations_num_bits
        return said

    def _decision(self, layer: Layer, made: set[tuple[str, int]], rounded: set[str]) -> LayerDecision:
        name = layer.name
        own = self._activation_bits(name) if (name, 0) in made else None
        weights = None
        if layer.weighted:
            said = self.said.get(name, Said()).weights_num_bits
            weights = said if said is not None else self.settings.global_quantization_settings.weights_num_bits
            weights = self.target.weight_bits(layer, weights, self.settings.deployment_settings.vnni)
        if name in self.skips:
            reason, detail = self.skips[name]
            return LayerDecision(False, reason, detail, weights if reason == WEIGHT_ONLY else None, own)
        if layer.kind == "input" and (name, 0) not in made:
            return LayerDecision(False, "rule", "no INT8 layer reads it")
        if self._passes(name) and name not in rounded:
            return LayerDecision(False, "rule", "the tensor it passes on is in float on both sides")
        return LayerDecision(True, "", "", weights, own)

    def _boundaries(self, decisions: dict[str, LayerDecision]) -> list[Boundary]:
        found: dict[Boundary, None] = {}
        for edge in self.graph.edges:
            source, destination = self.origin[edge.source, edge.source_output][0], edge.destination
            if self._passes(destination) or self.graph[destination].kind == "output" or not self._is_float((source, 0)):
                continue
            before, after = decisions[source].quantized, decisions[destination].quantized
            if before != after:
                found[Boundary(source, destination, "INT8 → float" if before else "float → INT8")] = None
        return list(found)


def _has_statistics(layer: Layer) -> bool:
    """Whether a batch norm has running statistics, so that it is one factor and one shift for each channel."""
    return layer.attributes.get("running_statistics") is not False
