"""Which layers the settings name, and what they say of each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from lightning_cco.errors import CCOError
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.settings import LayerRule

# How exactly a rule names a layer; the more exact rule wins over the wider one, and the inner container over the outer.
_WIDE, _CONTAINER, _PATH, _NAME = range(4)
BY_BUDGET = "the budget"
BY_ITSELF = _PATH
"""From here on a rule names the one layer."""


@dataclass
class ResolvedRules:
    """What the rules say of one layer. Each part remembers how exactly its rule named the layer, and which rule it was."""

    skip: bool | None = None
    skip_by: str = ""
    skip_exactness: float = -1
    weights_num_bits: int | None = None
    weights_exactness: float = -1
    weights_by: str = ""
    activations_num_bits: int | None = None
    activations_exactness: float = -1
    activations_by: str = ""
    weight_only: bool | None = None
    weight_only_exactness: float = -1
    weight_only_by: str = ""
    weights_group_size: int | None = None
    groups_exactness: float = -1
    groups_by: str = ""
    weights_symmetric: bool | None = None
    symmetric_exactness: float = -1
    symmetric_by: str = ""
    activations_dynamic: bool | None = None
    dynamic_exactness: float = -1
    dynamic_by: str = ""

    @property
    def asked_for(self) -> bool:
        """Whether a rule names the layer itself and wants it quantized."""
        return self.skip is False and self.skip_exactness >= BY_ITSELF


def apply_rules(graph: LayerGraph, rules: Sequence[LayerRule]) -> dict[str, ResolvedRules]:
    """Resolve every rule against the graph.

    A rule that names a layer more exactly (name, then path, then the inner container, then the outer, then glob or range) wins over a wider one.

    Raises:
        CCOError: A rule matches nothing, a destination can't be reached, or two equally exact rules contradict each other.
    """
    resolved: dict[str, ResolvedRules] = {}

    def say(name: str, part: str, value: object, exactness: float, by: str) -> None:
        entry = resolved.setdefault(name, ResolvedRules())
        known, known_exactness, known_by = getattr(entry, part), getattr(entry, _EXACTNESS[part]), getattr(entry, _BY[part])
        if by == BY_BUDGET and known is not None:
            return
        if known is not None and known != value and known_exactness == exactness:
            raise CCOError(
                f"layer_settings: two rules contradict each other on layer '{name}': {known_by} says {_WORDS[part]}: {_yaml(known)}, "
                f"{by} says {_WORDS[part]}: {_yaml(value)}. Remove one of them"
                + ("." if exactness == _NAME else ", or name the layer itself in the one that should win.")
            )
        if exactness >= known_exactness:
            setattr(entry, part, value)
            setattr(entry, _EXACTNESS[part], exactness)
            setattr(entry, _BY[part], by)

    for rule in sorted(rules, key=lambda rule: rule.by == "budget"):
        try:
            named = _named(graph, rule)
        except CCOError as error:
            raise CCOError(f"layer_settings (match: {rule.match}): {error}") from None
        _apply(graph, rule, named, say)
    return resolved


@dataclass
class _Named:
    """The layers that a rule matches, and those that it skips with them."""

    names: list[str]
    until: Collection[str] = ()
    downstream: Collection[str] = ()


def _named(graph: LayerGraph, rule: LayerRule) -> _Named:
    named = _Named(graph.select(rule.match))
    if rule.skip_quantization and rule.skip_quantization_until:
        until = list(dict.fromkeys(layer for pattern in rule.skip_quantization_until for layer in graph.select(pattern)))
        named.until = graph.between(named.names, until).difference(named.names)
    if rule.skip_quantization and rule.skip_quantization_downstream:
        named.downstream = graph.downstream(named.names).difference(named.names)
    return named


def _apply(graph: LayerGraph, rule: LayerRule, named: _Named, say: Callable[[str, str, object, float, str], None]) -> None:
    by = BY_BUDGET if rule.by == "budget" else f"the rule '{rule.match}'"
    targets = ", ".join(f"'{pattern}'" for pattern in rule.skip_quantization_until or ())
    for inside in named.until:
        say(inside, "skip", True, _WIDE, f"{by} until {targets}")
    for inside in named.downstream:
        say(inside, "skip", True, _WIDE, f"{by} and everything downstream")
    for name in named.names:
        exactness = _exactness(graph, rule.match, name)
        if rule.skip_quantization is not None:
            say(name, "skip", rule.skip_quantization, exactness, by)
        for part in _SAID_AS_THEY_ARE:
            if getattr(rule, part) is not None:
                say(name, part, getattr(rule, part), exactness, by)


_EXACTNESS = {
    "skip": "skip_exactness",
    "weights_num_bits": "weights_exactness",
    "activations_num_bits": "activations_exactness",
    "weight_only": "weight_only_exactness",
    "weights_group_size": "groups_exactness",
    "weights_symmetric": "symmetric_exactness",
    "activations_dynamic": "dynamic_exactness",
}
_BY = {
    "skip": "skip_by",
    "weights_num_bits": "weights_by",
    "activations_num_bits": "activations_by",
    "weight_only": "weight_only_by",
    "weights_group_size": "groups_by",
    "weights_symmetric": "symmetric_by",
    "activations_dynamic": "dynamic_by",
}
_SAID_AS_THEY_ARE = tuple(part for part in _BY if part != "skip")
_WORDS = {part: "skip_quantization" if part == "skip" else part for part in _BY}


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _exactness(graph: LayerGraph, pattern: str, name: str) -> float:
    path = pattern.removeprefix("path:")
    if pattern == name:
        return _NAME
    if path == graph[name].path:
        return _PATH
    if graph[name].path.startswith(f"{path}."):
        return _CONTAINER + (path.count(".") + 1) / 1000
    return _WIDE
