"""What the log says of a plan, in a few lines for any model; and the whole of it, for ``layers.txt``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from lightning_cco.export.engine_patterns import overflow_advice
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.monitoring.tables import parsed_layers, text_table
from lightning_cco.names import printable
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.quantization.skip_reasons import SkipReason
from lightning_cco.quantization.targets import TARGETS

MOST_LINES = 36
"""Lines in the log before a training, for any model; a few of the callback and of the calibration come to them."""
_FEW = 6  # names, lines of one kind, that are shown one by one
_LONGEST = 200  # about so many characters of a line: more are not read at a glance, and a line of layers of deep modules grew to 400
_LEAST = 60  # characters for names, whatever is said before them
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def start_lines(graph: LayerGraph, plan: QuantizationPlan) -> list[str]:
    """What the log says at the start: how much runs in INT8, the map from modules to layers if it is short, and the plan."""
    summary, *said = plan_lines(plan)
    table = parsed_layers(graph).splitlines()
    if len(table) + 2 + len(said) <= MOST_LINES:
        return [summary, "Parsed layers:", *table, *said]
    count = sum(layer.kind != "output" for layer in graph)  # as many as the map has rows
    return [summary, f"Parsed layers: {count}; the map from module to layer, with bits and reasons, is in layers.txt", *said]


def plan_lines(plan: QuantizationPlan) -> list[str]:
    """The weighted layers in INT8, the automatic skips, the counts, the bits, the layers left in float with reasons, the boundaries."""
    tail = plan.left_for(SkipReason.TAIL)
    lines = [plan.summary]
    if tail:
        lines.append(_named("Skipped Quantization automatically for the Tail of the model: ", plan.graph, tail, quoted=True))
    lines += [f"# of all Layers      : {plan.counted}", f"# of Quantized Layers: {len(plan.quantized)}"]
    lines += _bits(plan)
    if plan.kept_at_8_bits:
        lines.append(
            _named("Kept at 8 bits, unless a rule names them (see the guide, few bits): ", plan.graph, plan.kept_at_8_bits, quoted=True)
        )
    by_reason: dict[str, list[str]] = {}
    for name in plan.skipped:
        if name not in tail:
            by_reason.setdefault(_left(plan, name), []).append(name)
    lines += _few([_named(f"{said}: ", plan.graph, names) for said, names in by_reason.items()], 2 * _FEW, "reasons")
    lines += [*_boundaries(plan), *_processors(plan)]
    return [printable(line) for line in lines]


def _bits(plan: QuantizationPlan) -> list[str]:
    forms = {
        name: (decision.weights_num_bits, decision.weights_group_size or 0, not decision.weights_symmetric)
        for name, decision in plan.decisions.items()
        if decision.weights_num_bits is not None
    }
    said = {
        form: f"{form[0]} bits for Weight Quantization"
        + (f", in groups of {form[1]}" if form[1] else "")
        + (", with zero points" if form[2] else "")
        for form in forms.values()
    }
    if len(forms) <= _FEW:
        return [f"'{name}': using {said[form]}" for name, form in forms.items()]
    return [
        _named(f"Using {said[form]}: ", plan.graph, [name for name, its in forms.items() if its == form], quoted=True)
        for form in sorted(said)
    ]


def _runs(plan: QuantizationPlan, name: str) -> str:
    if name in plan.packed:
        return "Weights packed in 4 bits, computed in float"
    return "INT8" if name in plan.in_int8 else _left(plan, name)


def _left(plan: QuantizationPlan, name: str) -> str:
    """How a layer runs that does not run in INT8, and why."""
    reason = plan.skipped[name]
    if not plan.counts(name):
        return "Not counted (not part of the deployed model)"
    if name in plan.dynamic:
        return f"Integer weights ({reason})"
    if name in plan.weight_only:
        return f"Integer weights, computed in float ({reason})"
    bits = rounded_to(plan, name)
    return f"Computed in float, result rounded to {bits} bits for INT8 layers ({reason})" if bits else f"Not quantized ({reason})"


def rounded_to(plan: QuantizationPlan, name: str) -> int | None:
    """Bits of the output of a layer in float that is rounded where it is made, since INT8 layers read it; `None` if it is not."""
    decision = plan.decisions[name]
    return decision.activations_num_bits if not decision.quantized and plan.rounds(name) else None


def _boundaries(plan: QuantizationPlan) -> list[str]:
    crossings: dict[tuple[str, str], list[str]] = {}
    for boundary in plan.boundaries:
        crossings.setdefault((boundary.direction, boundary.source), []).append(boundary.destination)
    if len(crossings) <= _FEW:
        return [
            _named(f"{direction}: from '{source}' to ", plan.graph, destinations, quoted=True)
            for (direction, source), destinations in crossings.items()
        ]
    found: dict[str, list[str]] = {}
    for direction, source in crossings:
        found.setdefault(direction, []).append(source)
    return [_named(f"{direction}, {len(sources)} times: after ", plan.graph, sources) for direction, sources in found.items()]


def _processors(plan: QuantizationPlan) -> list[str]:
    """What an export would say of the processors that the file is not for, while it can still be trained for them."""
    deployment = plan.settings.deployment_settings
    wide = [name for name in plan.in_int8 if (plan.decisions[name].weights_num_bits or 0) > 7 and plan.graph[name].kind != "embedding"]
    return (
        [f"Note: {overflow_advice()}"]
        if wide and deployment.vnni is None and TARGETS[deployment.target_framework].narrow_without_vnni
        else []
    )


def _named(said: str, graph: LayerGraph, names: Sequence[str], quoted: bool = False) -> str:
    """A line that names layers, of a length that is read at a glance."""
    return said + folded(graph, names, quoted, max(_LONGEST - len(said), _LEAST))


def folded(graph: LayerGraph, names: Sequence[str], quoted: bool = False, room: int = _LONGEST) -> str:
    """Names of layers; if there are many, the modules that contain them, with repeated ones folded: ``blocks.[0-11].attn.qkv × 12``.

    Args:
        graph: The layers.
        names: Some of their names.
        quoted: Whether to put names into quotes.
        room: About how many characters; at least one name is shown, and of the others how many there are.
    """
    every = ", ".join(f"'{name}'" if quoted else name for name in names)
    if len(names) <= _FEW and (len(every) <= room or len(names) == 1):
        return every
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        layer = graph[name]
        groups.setdefault((_NUMBER.sub("#", layer.path), layer.kind), []).append(name)
    kinds = Counter(path for path, _ in groups)
    shown = [(_one(graph, members, alone=kinds[path] == 1), len(members)) for (path, _), members in groups.items()]
    kept = 0
    while kept < min(len(shown), _FEW) and (not kept or len(", ".join(text for text, _ in shown[: kept + 1])) <= room):
        kept += 1
    said, rest = [text for text, _ in shown[:kept]], [text for text, _ in shown[kept:]]
    more = sum(count for _, count in shown[kept:])
    note = f"… and {more} more layer{'s' if more > 1 else ''} (all are in layers.txt)"
    return ", ".join([*said, note] if len(", ".join(rest)) > len(note) else [*said, *rest])


def _one(graph: LayerGraph, names: Sequence[str], alone: bool) -> str:
    """One group of layers whose modules differ in numbers alone; with their kind where layers of others stand in the same modules."""
    if len(names) == 1:
        return names[0]
    paths = [graph[name].path for name in names]
    numbers = [list(map(int, _NUMBER.findall(path))) for path in paths]
    ranges = iter([_range({row[place] for row in numbers}) for place in range(len(numbers[0]))])
    place = _NUMBER.sub(lambda _: next(ranges), paths[0])
    kind = graph[names[0]].kind
    where = place if alone and len(set(paths)) == len(paths) and place else f"{kind} in {place}" if place else kind
    return f"{where} × {len(names)}"


def _range(values: set[int]) -> str:
    """A set of numbers, short: ``3``, ``[0-11]``, ``[0,2,4]``; of many with gaps the ends: ``[1…23]``.

    >>> _range({3}), _range({0, 1, 2}), _range({0, 2}), _range(set(range(1, 24, 2)))
    ('3', '[0-2]', '[0,2]', '[1…23]')
    """
    low, high = min(values), max(values)
    if low == high:
        return str(low)
    if len(values) == high - low + 1:
        return f"[{low}-{high}]"
    return f"[{low}…{high}]" if len(values) > _FEW else f"[{','.join(map(str, sorted(values)))}]"


def _few(lines: Sequence[str], most: int, what: str) -> list[str]:
    return list(lines) if len(lines) <= most else [*lines[: most - 1], f"… and {len(lines) - most + 1} more {what} (all are in layers.txt)"]


def layers_text(plan: QuantizationPlan) -> str:
    """Every layer: its module, bits, how it runs and why, and what it multiplies."""
    rows: Iterable[list[str]] = (
        [
            layer.path or (f"(argument {layer.attributes.get('argument', '')})" if layer.kind == "input" else "-"),
            layer.name,
            layer.kind,
            plan.decisions[layer.name].bits() or "-",
            f"{layer.multiplications:,}" if layer.multiplications else "-",
            _runs(plan, layer.name),
        ]
        for layer in plan.graph
        if layer.kind != "output"
    )
    return f"{plan.summary}\n\n{text_table(['module', 'layer', 'kind', 'bits', 'multiplications', 'runs'], rows, right=[4])}\n"
