"""Which quantizers apply to which arguments and results of a call: the tables in which the runtime looks up calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from lightning_cco.graph.call import ArgPath
from lightning_cco.graph.call_node import CallNode
from lightning_cco.graph.captured import CallSite, Capture
from lightning_cco.graph.ops import OPS, Category, is_known_kind, operation_of_kind
from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.bias_correction import BiasCorrection
from lightning_cco.quantization.clamp_limits import LIMITS, Limits
from lightning_cco.quantization.dynamic_activations import DynamicQuantizer, dynamic_slot
from lightning_cco.quantization.learned_quantizers import LearnedActivationQuantizer
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.quantization.tensor_key import TensorKey
from lightning_cco.quantization.weight_quantizer import WeightQuantizer


@dataclass(slots=True)
class SiteQuantizers:
    """The quantizers of one layer, and the arguments or results that they apply to.

    Attributes:
        correction: What is added to the bias; `None`: nothing.
        dynamic: What is rounded by a range that is found now, and by what; `None`: nothing.
        plain_slots: Whether all tensors that are quantized before the call are positional arguments, none inside of a container.
        passes: Whether the call only passes on values, or some of them.
    """

    layer: str
    weights: list[tuple[ArgPath, WeightQuantizer]] = field(default_factory=list)
    reads: list[tuple[ArgPath, str, ActivationQuantizer]] = field(default_factory=list)
    outputs: list[tuple[int, ActivationQuantizer]] = field(default_factory=list)
    correction: BiasCorrection | None = None
    dynamic: tuple[ArgPath, DynamicQuantizer] | None = None
    limits: Limits | None = None
    in_place: bool = False
    fresh: bool = False
    fresh_without_gradients: bool = False
    renormalizes: bool = False
    code_position: int = -1
    plain_slots: bool = False
    passes: bool = False


@dataclass(slots=True)
class FunctionEntry:
    """All calls of one operation within one frame.

    Attributes:
        kind: The operation.
        known: Numbers of those that were captured, and the place of each in the user's code.
        onward: Places of calls that a loop over modules makes in each round; `None`: calls are told apart by their order alone, since none is quantized.
        lines, onward_lines: The same for compiled code, by files and lines; empty where order tells the calls apart.
        sites: Which of them are quantized.
        layers: Those that lead to a layer with weights, or are one; not what is made of the outputs, nor what is no layer.
    """

    kind: str
    known: Mapping[int, int]
    onward: frozenset[int] | None = None
    lines: Mapping[int, str] = field(default_factory=dict)
    onward_lines: frozenset[str] = frozenset()
    sites: dict[int, SiteQuantizers] = field(default_factory=dict)
    layers: set[int] = field(default_factory=set)


def fill_tables(
    capture: Capture,
    plan: QuantizationPlan,
    activations: Mapping[TensorKey, ActivationQuantizer],
    weights: Mapping[str, list[WeightQuantizer]],
    corrections: Mapping[str, BiasCorrection],
) -> None:
    """Fill the tables of every call node from a plan."""
    for node in capture.root.walk():
        for training in (False, True):
            node.tables[training] = by_spelling(_entries(node, training))
    weighted = [layer.name for layer in capture.graph if layer.weighted]
    leading = capture.graph.ancestors(weighted)
    for site in capture.sites.values():
        if site.layer in leading:
            for training, position in site.positions.items():
                if site.function in site.node.tables[training]:
                    site.node.tables[training][site.function].layers.add(position)
        quantizers = site_quantizers(site, capture, plan, activations, weights)
        if quantizers is None:
            continue
        quantizers.correction = corrections.get(site.layer)
        for training, position in site.positions.items():
            entry = site.node.tables[training].get(site.function)
            if entry is not None:
                entry.sites[position] = quantizers
    for node in capture.root.walk():
        node.tables = {training: _needed(table) for training, table in node.tables.items()}


def _needed(table: dict[str, FunctionEntry]) -> dict[str, FunctionEntry]:
    """A filled table without what only moves values, as most calls of a transformer do: no entry, no work. Where something is quantized, places count."""
    for entry in table.values():
        if entry.sites and entry.onward is None:
            entry.onward = frozenset()
    return {name: entry for name, entry in table.items() if entry.sites or not only_moves(entry.kind)}


def _entries(node: CallNode, training: bool) -> dict[str, FunctionEntry]:
    """What was captured within a frame, nothing of it quantized yet."""
    seen = node.seen[training] or node.seen[False]
    found = {kind: FunctionEntry(kind, node.known(kind, training)) for kind in (*seen, *node.numbers)}
    for kind, loop in node.numbers.items():
        found[kind].onward = loop.onward()
        found[kind].onward_lines = frozenset(node.lines[place] for place in loop.onward())
    for kind in {*node.numbers, *node.idle} & found.keys():
        found[kind].lines = {number: node.lines.get(place, "") for number, place in found[kind].known.items()}
    return found


def unwatched_modules(capture: Capture, model: nn.Module) -> frozenset[str]:
    """Paths of PyTorch's own modules in none of whose calls anything is rounded, once the tables are filled: most batch norms, poolings.

    What a module of the user's own calls may change from call to call: those are looked at, so that what the capture did not see is reported.
    """
    own = {path for path, module in model.named_modules() if type(module).__module__.startswith("torch.nn.")}
    known, needed = set(), {""}
    for node in capture.root.walk():
        known.add(node.path)
        if not node.captured or node.children or any(entry.sites for table in node.tables.values() for entry in table.values()):
            needed.add(node.path)
    return frozenset((known & own) - needed)


def dynamic_quantizers(capture: Capture) -> dict[str, DynamicQuantizer]:
    """What rounds by ranges that are found when it runs, by layer."""
    tables = (table for node in capture.root.walk() for table in node.tables.values())
    sites = (site for table in tables for entry in table.values() for site in entry.sites.values())
    return {site.layer: site.dynamic[1] for site in sites if site.dynamic is not None}


def only_moves(kind: str) -> bool:
    """Whether an operation computes nothing, so that nobody minds how often it is called."""
    return operation_of_kind(kind).category in (Category.PRESERVE, Category.ALIAS, Category.IDENTITY)


def by_spelling(entries: dict[str, FunctionEntry]) -> dict[str, FunctionEntry]:
    """By function name: every spelling of an operation shares one entry, also where the table of operations does not know it (``exp_``, ``__rpow__``)."""
    spelled = {name: entries[op.kind] for name, op in OPS.items() if op.kind in entries}
    guessed = {
        name: entry for kind, entry in entries.items() if not is_known_kind(kind) for name in (f"{kind}_", f"_{kind}", f"__{kind}__")
    }
    return {**guessed, **entries, **spelled}


def site_quantizers(
    site: CallSite,
    capture: Capture,
    plan: QuantizationPlan,
    activations: Mapping[TensorKey, ActivationQuantizer],
    weights: Mapping[str, list[WeightQuantizer]],
) -> SiteQuantizers | None:
    """The quantizers of a layer's call; `None` if nothing is quantized there."""
    if not site.visible:
        return None
    found = SiteQuantizers(
        site.layer,
        in_place=site.in_place,
        fresh=site.op.fresh,
        fresh_without_gradients=site.op.fresh_without_gradients,
        renormalizes=site.op.looks_up,
        code_position=site.code_position,
        passes=site.op.category in (Category.PRESERVE, Category.IDENTITY),
    )
    if site.layer in weights:
        found.weights = [(weight.slot, quantizer) for weight, quantizer in zip(site.weights, weights[site.layer], strict=True)]
    block = plan.decisions[site.layer].activations_block
    slot = None if block is None else dynamic_slot(site)
    if block is not None and slot is not None:
        found.dynamic = slot, DynamicQuantizer(block)
    for number, key in plan.reads.get(site.layer, {}).items():
        source, made_by = site.sources[number], plan.tensors[key].layer
        changed = site.in_place and source.slot == (0,)  # the caller's own tensor, which must be written to
        if source.quantizable and not changed:
            # What a layer with weights makes, or what is rounded there already, is recorded where it is made.
            recorded_there = made_by in weights or plan.rounds(TensorKey(made_by, key.output))
            found.reads.append((source.slot, "" if recorded_there else made_by, activations[key]))
    for output in range(len(plan.graph[site.layer].output_dtypes)):
        key = TensorKey(site.layer, output)
        if plan.rounds(key):
            found.outputs.append((output, activations[key]))
    if any(isinstance(quantizer, LearnedActivationQuantizer) for _, quantizer in found.outputs):
        found.fresh = found.fresh_without_gradients = False  # its backward needs what would be overwritten
    if found.outputs and site.op.category is Category.CLAMP:
        found.limits = LIMITS.get(site.function)
    slots = [slot for slot, _ in found.weights] + [slot for slot, _, _ in found.reads]
    found.plain_slots = all(len(slot) == 1 and isinstance(slot[0], int) for slot in slots)
    return found if found.weights or found.reads or found.outputs else None
