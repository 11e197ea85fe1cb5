"""Which of the calls of two forwards are the same layer: repeated calls of a module, and those of evaluation found again in training."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_cco.graph.call import Call
from lightning_cco.graph.ops import Category
from lightning_cco.graph.outside_readers import with_reader


def merge_repeats(calls: list[Call]) -> tuple[list[Call], dict[int, int]]:
    """Let a module that the step calls several times from outside any frame (a discriminator on real and fake) be one set of layers."""
    kept: list[Call] = []
    first: dict[Any, int] = {}
    merged: dict[int, int] = {}
    for number, call in enumerate(calls):
        ends_at = [(merged[read.source], read.output) for read in call.reads] if call.op.kind == "output" else []
        key = _place(call) if call.visible else ("output", *ends_at) if ends_at else None
        if key is not None and key in first:
            merged[number] = first[key]
            for output in call.layer.read_out:
                with_reader(kept[first[key]], output)
            _drop_other_cuts(kept[first[key]], call)
            _drop_other_constant(kept[first[key]], call)
            continue
        if key is not None:
            first[key] = len(kept)
        merged[number] = len(kept)
        kept.append(call)
    gone = _read_by_repeats_alone(calls, kept, merged)
    positions = {k: position for position, k in enumerate(k for k in range(len(kept)) if k not in gone)}
    return [kept[k] for k in positions], {number: positions[k] for number, k in merged.items() if k in positions}


def _drop_other_cuts(call: Call, repeated: Call) -> None:
    """A constant that is cut from another parameter in each call of a module has the scale of what is read there."""
    others = {weight.slot: weight.cut_from for weight in repeated.weights}
    call.weights = [weight if others.get(weight.slot) == weight.cut_from else replace(weight, cut_from=None) for weight in call.weights]


def _drop_other_constant(call: Call, repeated: Call) -> None:
    """What is multiplied by another parameter in each call of a module can't take it into its weights."""
    if (call.layer.constant, call.layer.parameters) != (repeated.layer.constant, repeated.layer.parameters):
        call.layer = replace(call.layer, constant=None)


def _read_by_repeats_alone(calls: list[Call], kept: list[Call], merged: dict[int, int]) -> set[int]:
    """Inputs, and what stands outside of modules, that nothing but a repeated call of a module reads."""
    had_readers = {merged[read.source] for call in calls for read in call.reads}
    readers: dict[int, set[int]] = {}
    for k, call in enumerate(kept):
        for read in call.reads:
            readers.setdefault(merged[read.source], set()).add(k)
    gone: set[int] = set()
    for k in reversed(range(len(kept))):
        if not kept[k].visible and k in had_readers and all(reader in gone for reader in readers.get(k, ())):
            gone.add(k)
    return gone


def _place(call: Call) -> tuple[Any, ...]:
    return id(call.node), call.op.kind, call.index


def overwritten_calls(calls: list[Call]) -> set[int]:
    """Numbers of the calls whose output a later one writes over, directly or through views."""
    found: set[int] = set()
    for call in calls:
        source = call.reads[0].source if call.in_place and call.reads and call.reads[0].slot == (0,) else None
        while source is not None:
            found.add(source)
            before = calls[source]
            is_view = before.op.category in (Category.PRESERVE, Category.IDENTITY) and before.reads
            source = before.reads[0].source if is_view else None
    return found


@dataclass
class Matched:
    """Which calls of evaluation are which of training.

    Attributes:
        positions: Of each call of evaluation its index within the frame, for evaluation (`False`) and training (`True`).
        evaluation_only: The calls that evaluation alone makes.
        training_only: Those that training alone makes.
    """

    positions: dict[int, dict[bool, int]]
    evaluation_only: list[Call] = field(default_factory=list)
    training_only: list[Call] = field(default_factory=list)


def match_training(calls: list[Call], trained: list[Call] | None) -> Matched:
    """Find each call of evaluation in the training run, and note who else reads what it makes there.

    A branch under ``if self.training`` makes further calls and shifts the indices of those after it; the two sequences of calls of one
    operation within one frame are then aligned by what the calls look like.
    """
    positions = {i: {False: call.index, True: call.index} for i, call in enumerate(calls)}
    found = Matched(positions)
    if trained is None:
        return found
    kept, _ = merge_repeats(trained)
    for numbers, theirs in _by_place(calls, kept):
        if not theirs:
            found.evaluation_only += [calls[i] for i in numbers]
            continue
        if not all(call.training for call in theirs):
            continue  # run in evaluation mode (a frozen backbone): nothing to learn
        mine = [calls[i] for i in numbers]
        paired = _pair_loops(mine, theirs) if theirs[0].op.kind in theirs[0].node.numbers else _pair(mine, theirs)
        for position, i in enumerate(numbers):
            if position in paired:
                positions[i][True] = theirs[paired[position]].index
                for output in theirs[paired[position]].layer.read_out:
                    with_reader(calls[i], output)
            else:
                if not _is_passed_over(calls[i]):
                    del positions[i][True]
                found.evaluation_only.append(calls[i])
        matched = set(paired.values())
        found.training_only += [call for k, call in enumerate(theirs) if k not in matched and _computes(call)]
    return found


def _by_place(calls: list[Call], trained: list[Call]) -> Iterable[tuple[list[int], list[Call]]]:
    """The calls of one operation within one frame: numbers of those of evaluation, and those of training."""
    groups: dict[tuple[int, str], tuple[list[int], list[Call]]] = {}
    for i, call in enumerate(calls):
        if call.visible:
            groups.setdefault((id(call.node), call.op.kind), ([], []))[0].append(i)
    for call in trained:
        if call.visible:
            groups.setdefault((id(call.node), call.op.kind), ([], []))[1].append(call)
    return groups.values()


def _computes(call: Call) -> bool:
    return call.op.category is not Category.IDENTITY and call.layer.note != "integer"


def _looks(call: Call) -> str:
    """What tells one call of an operation from the next: its place in the user's code, else its shapes and parameters."""
    if call.position >= 0:
        return str(call.position)
    layer = call.layer
    attributes = {name: value for name, value in layer.attributes.items() if name != "running_statistics"}  # in training none are used
    return repr((layer.input_shapes, layer.output_shapes, layer.parameters, attributes, [read.slot for read in call.reads]))


def _looks_at_any_size(call: Call) -> str:
    """The same without sizes: training may drop tokens, crop images, select samples, or send others to an expert."""
    if call.position >= 0:
        return str(call.position)
    layer = call.layer
    ranks = [[len(shape) for shape in shapes] for shapes in (layer.input_shapes, layer.output_shapes)]
    return repr((ranks, layer.parameters, layer.attributes if layer.weighted else {}, [read.slot for read in call.reads]))


def _is_passed_over(call: Call) -> bool:
    """Whether a call of a loop comes after a module that the training has left out, this time."""
    loop = call.node.numbers.get(call.op.kind)
    return loop is not None and call.index not in loop.paired and call.index not in loop.places[True]


def _pair_loops(evaluated: list[Call], trained: list[Call]) -> dict[int, int]:
    """The same for the calls of a loop over modules, which have been paired where they were counted."""
    loop = trained[0].node.numbers[trained[0].op.kind]
    by_number = {call.index: number for number, call in reversed([*enumerate(trained)])}
    pairs = {number: by_number.get(loop.paired.get(call.index, -1)) for number, call in enumerate(evaluated)}
    return {number: other for number, other in pairs.items() if other is not None}


def _pair(evaluated: list[Call], trained: list[Call]) -> dict[int, int]:
    """Numbers of the calls of training by those of evaluation: first of calls that look alike, then of those between them that do but for their sizes."""
    pairs: dict[int, int] = {}
    between = [(range(len(evaluated)), range(len(trained)))]
    for looks in (_looks, _looks_at_any_size):
        pending, between = between, []
        for mine, theirs in pending:
            sides = [looks(evaluated[k]) for k in mine], [looks(trained[k]) for k in theirs]
            done, their_done = 0, 0
            for a, b, size in (
                [(0, 0, len(mine))] if sides[0] == sides[1] else difflib.SequenceMatcher(None, *sides, False).get_matching_blocks()
            ):
                pairs.update(zip(mine[a : a + size], theirs[b : b + size], strict=True))
                if a > done and b > their_done:
                    between.append((mine[done:a], theirs[their_done:b]))
                done, their_done = a + size, b + size
    return pairs
