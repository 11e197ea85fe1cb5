"""What can be chosen: for each group of layers that share their bits in which form it runs, for each tensor to how many bits it is rounded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_cco.budget.facts import WeightFacts
from lightning_cco.budget.option import FLOAT, FLOAT_BITS, INTEGER, WEIGHT_ONLY, Option
from lightning_cco.budget.speed import SpeedModel
from lightning_cco.graph.layer import Edge
from lightning_cco.loss_sensitivity import LossSensitivityReport
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.quantization.rules import ResolvedRules, apply_rules
from lightning_cco.quantization.targets import TARGETS
from lightning_cco.quantization.tensor_key import TensorKey
from lightning_cco.settings import LayerRule, Settings

UNIFORM: Mapping[str, tuple[int, int]] = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4)}
"""Bits of weights and activations of the plans that a budget is compared with."""


@dataclass(frozen=True)
class LayerGroup:
    """Layers that share their bits: they read the same weights, or are projections of one tensor.

    Attributes:
        layers: Their names, in graph order.
        options: What can be chosen for them.
        inputs: For each layer the quantizers of what it reads.
        outputs: The quantizers of what they make, which integer layers round.
        uniforms: What the plan of equal bits everywhere makes of them, by its name (`UNIFORM`).
        why: Why there is no more to choose from; empty if there is.
    """

    layers: tuple[str, ...]
    options: tuple[Option, ...]
    inputs: tuple[TensorKey, ...] = ()
    outputs: tuple[TensorKey, ...] = ()
    uniforms: Mapping[str, Option] = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True)
class TensorOptions:
    """A tensor that may be rounded.

    Attributes:
        key: The name of its quantizer.
        rises: Expected rise of the loss by the bits that can be chosen.
        optional: Whether it stays in float if no integer layer makes or reads it.
    """

    key: TensorKey
    rises: Mapping[int, float]
    optional: bool


@dataclass
class Choices:
    """All that can be chosen, and what is fixed.

    Attributes:
        groups: The groups of layers.
        tensors: The tensors.
        fixed_bytes: What else the file holds.
        float_bytes: Size of the float file, to which a size is relative.
        elements: Number of all weights that can be quantized.
        float_operations: Bit operations of the float model.
        every_rise: All rises of tensors by bits, for plans of equal bits.
        speed: What each choice takes of time, where that was measured.
    """

    groups: list[LayerGroup]
    tensors: list[TensorOptions]
    fixed_bytes: float
    float_bytes: float
    elements: float
    float_operations: float
    every_rise: dict[TensorKey, Mapping[int, float]] = field(default_factory=dict)
    speed: SpeedModel | None = None


def tail_rules(plan: QuantizationPlan, settings: Settings) -> list[LayerRule]:
    """The layers without weights of the tail, which stay in float: a budget decides on those with weights alone."""
    if not settings.global_quantization_settings.skip_tail_quantization:
        return []
    names = [name for name in plan.graph.names if name in plan.graph.tail() and not plan.graph[name].weighted]
    return [LayerRule(skip_quantization=True, match=name, by="budget") for name in names if plan.graph[name].kind != "output"]


def choices(
    plan: QuantizationPlan,
    settings: Settings,
    facts: Mapping[str, WeightFacts],
    report: LossSensitivityReport,
    float_size: float,
    weights_bits: Sequence[int],
    activations_bits: Sequence[int],
    packed: bool,
) -> Choices:
    """What can be chosen.

    Args:
        plan: The plan with everything quantized that can be, the tail included.
        settings: The recipe of the user, whose rules are kept.
        facts: The layers with weights.
        report: The loss sensitivities.
        float_size: Bytes of the float parameters.
        weights_bits: Numbers of bits to choose from for weights.
        activations_bits: Numbers of bits to choose from for activations.
        packed: Whether weights of at most 4 bits take half a byte in the file.
    """
    rules = apply_rules(plan.graph, [rule for rule in settings.layer_settings if rule.by != "budget"])
    tail = plan.graph.tail() if settings.global_quantization_settings.skip_tail_quantization else set()
    into: dict[str, list[Edge]] = {}
    for edge in plan.graph.edges:
        into.setdefault(edge.destination, []).append(edge)
    maker = _Maker(plan, settings, facts, report, tail, rules, weights_bits, activations_bits, packed, into)
    members = _shared([name for name in plan.graph.names if name in facts and plan.graph[name].weighted], plan, facts, into)
    groups = [group for names in members if (group := maker.group(names)) is not None]
    of_integers = {key for group in groups for key in (*group.inputs, *group.outputs)}
    rises: dict[TensorKey, Mapping[int, float]] = {key: report.activations.get(str(key), {}) for key in plan.tensors}
    tensors = []
    for key in plan.tensors:
        if plan.as_read(key) != key:
            continue  # of the residual stream: it keeps 8 bits
        bits = rules.get(key.layer, ResolvedRules()).activations_num_bits
        general = plan.tensors[key].num_bits == plan.settings.global_quantization_settings.activations_num_bits
        known = general and bool(rises[key])  # where nothing was measured, nothing says that fewer would do
        allowed = (bits,) if bits is not None else tuple(activations_bits) if known else (plan.tensors[key].num_bits,)
        tensors.append(TensorOptions(key, {b: _known_rise(rises[key], b) for b in allowed}, key in of_integers))
    elements = sum(facts[name].elements for group in groups for name in _once(group.layers, facts))
    own = sum(4.0 * facts[name].elements for group in groups for name in _once(group.layers, facts))
    operations = sum(facts[name].products * FLOAT_BITS**2 for group in groups for name in group.layers)
    return Choices(groups, tensors, max(0.0, float_size - own), float_size, elements, operations, rises)


@dataclass
class _Maker:
    plan: QuantizationPlan
    settings: Settings
    facts: Mapping[str, WeightFacts]
    report: LossSensitivityReport
    tail: set[str]
    rules: Mapping[str, ResolvedRules]
    weights_bits: Sequence[int]
    activations_bits: Sequence[int]
    packed: bool
    into: Mapping[str, list[Edge]]

    def group(self, names: Sequence[str]) -> LayerGroup | None:
        plan, target = self.plan, TARGETS[self.settings.deployment_settings.target_framework]
        vnni = self.settings.deployment_settings.vnni
        weight_only = all(name in plan.weight_only for name in names)
        entries = [self.rules.get(name, ResolvedRules()) for name in names]
        fixed = next((entry.weights_num_bits for entry in entries if entry.weights_num_bits is not None), None)
        inputs = tuple(dict.fromkeys(key for name in names for key in self._reads(name))) if not weight_only else ()
        outputs = tuple(dict.fromkeys(key for name in names for key in self._makes(name))) if not weight_only else ()
        in_tail = all(name in self.tail for name in names)
        unknown = [name for name in names if name not in self.report.weights]
        wanted_bits = [fixed] if fixed is not None else list(self.weights_bits)
        why = ""
        if unknown:
            wanted_bits, why = (
                [fixed or self.settings.global_quantization_settings.weights_num_bits],
                "no gradient reaches it, so nothing was measured",
            )
        bits = [target.weight_bits(plan.graph[names[0]], count, vnni) for count in wanted_bits]
        options: list[Option] = []
        for count in dict.fromkeys(bits):
            rise = sum(_known_rise(self.report.weights.get(name, {}), count) for name in names)
            stored = all(target.stores_weights(plan.graph[name]) for name in names)
            if weight_only or (stored and ((in_tail and not any(e.skip is False for e in entries)) or any(e.weight_only for e in entries))):
                options.append(self._option(names, WEIGHT_ONLY, count, FLOAT_BITS, rise))
            if not weight_only and not any(entry.weight_only for entry in entries):
                options += [self._option(names, INTEGER, count, a, rise) for a in (self._input_bits(inputs) or (FLOAT_BITS,))]
        kept = any(entry.skip is False or entry.weight_only for entry in entries)
        if fixed is None and not unknown and not kept:
            options.append(self._option(names, FLOAT, FLOAT_BITS, FLOAT_BITS, 0.0))
        elif fixed is not None:
            why = why or "a rule of the recipe"
        options = [option for option in options if math.isfinite(option.rise)] or options[:1]
        if not options:
            return None
        form = FLOAT if in_tail else WEIGHT_ONLY if weight_only else INTEGER
        uniforms = {name: self._uniform(names, form, *bits, rounded=bool(inputs)) for name, bits in UNIFORM.items()}
        return LayerGroup(tuple(names), tuple(options), inputs, outputs, uniforms, why)

    def _option(self, names: Sequence[str], form: str, weights: int, activations: int, rise: float) -> Option:
        once = _once(names, self.facts)
        elements = sum(self.facts[name].elements for name in once)
        channels = sum(self.facts[name].channels for name in once)
        packed = self.packed or any(self.facts[name].grouped for name in once)
        per_element = 4.0 if form == FLOAT else 0.5 if packed and weights <= 4 else 1.0
        size = elements * per_element + (0 if form == FLOAT else 5.0 * channels)  # a scale and a zero point each
        products = sum(self.facts[name].products for name in names)
        both = weights * activations if form == INTEGER else FLOAT_BITS * FLOAT_BITS
        return Option(form, weights, activations, rise, size, elements * weights, float(products * both))

    def _uniform(self, names: Sequence[str], form: str, weights: int, activations: int, rounded: bool) -> Option:
        bits = FLOAT_BITS if form == FLOAT else weights
        rise = 0.0 if form == FLOAT else sum(_known_rise(self.report.weights.get(name, {}), bits) for name in names)
        return self._option(names, form, bits, activations if form == INTEGER and rounded else FLOAT_BITS, rise)

    def _input_bits(self, inputs: Sequence[TensorKey]) -> tuple[int, ...]:
        if not inputs:
            return ()
        bits = self.rules.get(inputs[0].layer, ResolvedRules()).activations_num_bits
        return (bits,) if bits is not None else tuple(self.activations_bits)

    def _reads(self, name: str) -> list[TensorKey]:
        origins = (self.plan.origins.get(TensorKey(edge.source, edge.source_output)) for edge in self.into.get(name, ()))
        return [self.plan.as_read(key) for key in origins if key is not None and key in self.plan.tensors]

    def _makes(self, name: str) -> list[TensorKey]:
        end = self.plan.end_of_group(name)
        return [key for key in self.plan.tensors if key.layer == end and self.plan.as_read(key) == key]


def _shared(
    names: Sequence[str], plan: QuantizationPlan, facts: Mapping[str, WeightFacts], into: Mapping[str, list[Edge]]
) -> list[list[str]]:
    """Layers by who must have the same bits: those that read the same weights, and linear layers of one module that read one tensor (query, key, value)."""
    leader: dict[object, str] = {}
    member: dict[str, str] = {}
    for name in names:
        layer = plan.graph[name]
        marks: list[object] = list(facts[name].memory)
        if layer.kind == "linear":
            around = layer.path.rpartition(".")[0]
            marks += [(around, plan.origins.get(TensorKey(e.source, e.source_output)), layer.output_shapes) for e in into.get(name, ())]
        first = next((leader[mark] for mark in marks if mark in leader), name)
        member[name] = first
        for mark in marks:
            leader.setdefault(mark, first)
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(member[name], []).append(name)
    return list(found.values())


def _once(names: Sequence[str], facts: Mapping[str, WeightFacts]) -> list[str]:
    """One of each layers that read the same weights, which a file holds once."""
    return list({facts[name].memory: name for name in reversed(names)}.values())


def _known_rise(rises: Mapping[int, float], bits: int) -> float:
    """The rise at some bits; none where nothing was measured at any, and no way to take where it was measured at others alone."""
    rise = rises.get(bits, math.inf if rises else 0.0)
    return math.inf if math.isnan(rise) else max(0.0, rise)
