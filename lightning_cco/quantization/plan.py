"""The plan: which layers and which tensors are quantized, with how many bits, and why not."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.graph.ops import Category, operation_of_kind
from lightning_cco.number_format import per_cent
from lightning_cco.quantization.skip_reasons import Skip, SkipReason
from lightning_cco.quantization.targets import TARGETS
from lightning_cco.quantization.tensor_key import TensorKey
from lightning_cco.settings import LayerRule, Settings, load_settings


@dataclass(frozen=True)
class LayerDecision:
    """What is done to one layer.

    Attributes:
        quantized: Whether it runs in INT8 (or fewer bits).
        reason: Why it is left in float; `None` when quantized.
        detail: The reason in a sentence.
        weights_num_bits: Bits of its weight, also where only that is quantized; `None` without a quantized weight.
        activations_num_bits: Bits of the quantizer on its output; `None` if it has none of its own.
        weights_group_size: How many weights of an output share a scale; `None`: all of them.
        weights_symmetric: Whether its weight has no zero points.
        activations_block: How many values of a row of what it reads share a scale that is found when it runs; `None`: nothing is rounded so.
        read_num_bits: Bits that layers that multiply read its output with, where those of the residual stream are more; `None` where they are the same.
        weight_only_by_setting: Whether a setting asks for integer weights alone; otherwise the engine decides that of the layer.
    """

    quantized: bool
    reason: SkipReason | None = None
    detail: str = ""
    weights_num_bits: int | None = None
    activations_num_bits: int | None = None
    weights_group_size: int | None = None
    read_num_bits: int | None = None
    weights_symmetric: bool = True
    activations_block: int | None = None
    weight_only_by_setting: bool = False

    def bits(self, separator: str = "/") -> str:
        """Bits of weight and output in short; empty if it has neither.

        >>> LayerDecision(True, weights_num_bits=2, activations_num_bits=8, read_num_bits=2).bits()
        'W2/A8→2'
        """
        weights = [] if self.weights_num_bits is None else [f"W{self.weights_num_bits}"]
        read = "" if self.read_num_bits is None else f"→{self.read_num_bits}"
        return separator.join([*weights, *([] if self.activations_num_bits is None else [f"A{self.activations_num_bits}{read}"])])

    @property
    def weight_only(self) -> bool:
        """Whether its weights are integers in the file, but it is computed in float."""
        return not self.quantized and self.weights_num_bits is not None


@dataclass(frozen=True)
class Boundary:
    """A tensor that is converted between float and INT8.

    Attributes:
        source: The layer that produces it.
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
    as_read: bool = False

    @property
    def key(self) -> TensorKey:
        """Name of its quantizer: the layer's, with the output's number after it from the second on."""
        return TensorKey(self.layer, self.output, self.as_read)


def packs_weights(settings: Settings) -> bool:
    """Whether weights of at most 4 bits take half a byte in the file: as the recipe says, else if a budget counts on it."""
    said = settings.deployment_settings.int4
    if said is not None:
        return said
    budget = settings.budget_settings
    counted = budget.size is not None or budget.average_bits is not None or budget.accuracy_drop is not None
    return counted and not TARGETS[settings.deployment_settings.target_framework].refuses_int4


@dataclass
class QuantizationPlan:
    """Every layer's decision and every quantized tensor.

    Attributes:
        graph: The layer graph.
        settings: The settings that it follows.
        decisions: One per layer, outputs included.
        tensors: The fake-quantized tensors by quantizer name.
        boundaries: The tensors that are converted between float and INT8.
        suggestions: Layers skipped because of their sensitivity.
        origins: For every tensor the one that its values come from, through layers that only move values.
        groups: For each layer inside a fused group, the next one in it.
        forced: Layers that run in INT8 only because a rule asks for it by name.
        reads: For each layer, by the number of its input, the name of the quantizer that rounds that input.
        at_readers: Names of the quantizers that are applied where a tensor is read, not where it is produced, because it is also needed unquantized.
        folded: For each layer whose factors and shifts go into the quantized weights before it (batch norms, constants of channels), whose they are.
        kept_at_8_bits: Layers whose result, or whose weights, have 8 bits although the global settings say fewer: fewer would save nothing, or cost most.
        quantized: Layers whose weights and activations are quantized.
        packed: Layers in ``quantized`` whose weights are stored in 4 bits, for which no engine has an INT8 kernel.
        in_int8: The other layers in ``quantized``, which run in INT8.
        weight_only: Layers in float with integer weights.
        dynamic: Layers in ``weight_only`` whose inputs are dynamically quantized.
        skipped: The reason for each layer that does not run in INT8, including those in ``weight_only``.
    """

    graph: LayerGraph
    settings: Settings
    decisions: dict[str, LayerDecision]
    tensors: dict[TensorKey, TensorSpec]
    boundaries: list[Boundary]
    suggestions: tuple[str, ...] = ()
    origins: dict[TensorKey, TensorKey] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    forced: frozenset[str] = frozenset()
    reads: dict[str, dict[int, TensorKey]] = field(default_factory=dict)
    at_readers: frozenset[TensorKey] = frozenset()
    kept_at_8_bits: tuple[str, ...] = ()
    folded: dict[str, str] = field(default_factory=dict)
    quantized: set[str] = field(init=False)
    packed: set[str] = field(init=False)
    in_int8: set[str] = field(init=False)
    weight_only: set[str] = field(init=False)
    dynamic: set[str] = field(init=False)
    skipped: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.quantized = {name for name, decision in self.decisions.items() if decision.quantized}
        packs = packs_weights(self.settings)
        self.packed = {name for name in self.quantized if packs and (self.decisions[name].weights_num_bits or 8) <= 4}
        self.in_int8 = self.quantized - self.packed
        self.weight_only = {name for name, decision in self.decisions.items() if decision.weight_only}
        self.dynamic = {name for name, decision in self.decisions.items() if decision.activations_block is not None}
        self.skipped = {
            name: str(Skip(decision.reason, decision.detail))
            for name, decision in self.decisions.items()
            if decision.reason is not None and decision.reason is not SkipReason.OUTPUT
        }

    def as_read(self, key: TensorKey) -> TensorKey:
        """The quantizer that layers that multiply read a tensor through."""
        twin = TensorKey(key.layer, key.output, as_read=True)
        return twin if twin in self.tensors else key

    def end_of_group(self, name: str) -> str:
        """The layer at the end of the fused group that a layer is in, whose output is rounded; the layer itself if it is in none."""
        while name in self.groups:
            name = self.groups[name]
        return name

    def computed_with(self, name: str) -> str:
        """The layer whose product a multiplication by constants, or an addition of them, folds into; of any other layer, also a batch norm, itself."""
        return name if self.graph[name].constant is None else self.folded.get(name, name)

    def folded_after(self, name: str) -> list[str]:
        """The layers that fold into the weights of a layer, in their order."""
        found: list[str] = []
        while (after := self.groups.get(name)) is not None and after in self.folded:
            found.append(after)
            name = after
        return found

    def rounds(self, key: str) -> bool:
        """Whether a tensor, by the name of its quantizer, is rounded where it is made."""
        return key in self.tensors and key not in self.at_readers

    @property
    def share_of_multiplications(self) -> float:
        """The part of the model's multiplications that layers in INT8 compute, from 0 to 1; NaN if it has none."""
        total = sum(layer.multiplications for layer in self.graph)
        return sum(self.graph[name].multiplications for name in self.in_int8) / total if total else math.nan

    @property
    def summary(self) -> str:
        """How many of the layers with weights run in INT8, and how much of the multiplications: a sentence, the same wherever the plan is shown."""
        weighted = [layer.name for layer in self.graph if layer.weighted]
        share, target = self.share_of_multiplications, self.settings.deployment_settings.target_framework
        part = "" if math.isnan(share) else f" ({per_cent(share)} of the multiplications)"
        count = sum(name in self.in_int8 for name in weighted)
        if self.packed:
            part += f"; {len(self.packed)} have weights packed in 4 bits, and {target} computes them in float"
        in_float = len(self.weight_only - self.dynamic)
        only = f"; {in_float} more have integer weights and compute in float" if in_float else ""
        only += f"; {len(self.dynamic)} more multiply integer weights with what they round when they run" if self.dynamic else ""
        return f"{count} of {len(weighted)} layers with weights run in INT8 in {target}{part}{only}"

    def left_for(self, reason: SkipReason) -> list[str]:
        """The layers that are left in float for one kind of reason, in graph order."""
        return [name for name, decision in self.decisions.items() if decision.reason is reason]

    def fused_before(self, name: str) -> list[str]:
        """The layers of a fused group before one of its layers, the nearest first."""
        before = {after: inner for inner, after in self.groups.items()}
        found: list[str] = []
        while name in before:
            name = before[name]
            found.append(name)
        return found

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
        settings.global_quantization_settings.weight_only = False
        settings.global_quantization_settings.weights_group_size = None
        settings.global_quantization_settings.weights_symmetric = True
        settings.global_quantization_settings.activations_dynamic = False
        settings.layer_settings = []
        bits = self.output_bits()
        for layer in self.graph:
            if layer.kind == "output":
                continue
            decision = self.decisions[layer.name]
            with_weights = decision.quantized or decision.weight_only or layer.name in self.folded
            skip = True if not with_weights else False if layer.name in self.forced else None
            weight_only = True if decision.weight_only and decision.weight_only_by_setting else None
            rule = LayerRule(
                skip,
                weight_only=weight_only,
                weights_num_bits=decision.weights_num_bits,
                activations_num_bits=bits.get(layer.name),
                weights_group_size=decision.weights_group_size,
                weights_symmetric=None if decision.weights_symmetric else False,
                activations_dynamic=True if layer.name in self.dynamic else None,
                match=layer.name,
            )
            settings.layer_settings.append(rule)
        return settings

    def output_bits(self) -> dict[str, int]:
        """Bits of each layer's fake-quantized output, whether the layer itself runs in INT8 or only what reads it.

        Of a tensor of the residual stream with 8 bits those that INT8 layers read it with.
        """
        bits = {spec.layer: spec.num_bits for spec in self.tensors.values()}
        return bits | {spec.layer: spec.num_bits for spec in self.tensors.values() if spec.as_read}
