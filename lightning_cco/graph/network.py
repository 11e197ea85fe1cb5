"""What of a step is the network: the calls of modules with parameters, and what is computed between them.

What comes before the first of them (augmentations) and after the last one (losses, metrics) is no layer; nor is what inside of a module serves a loss alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from lightning_cco.graph.call import Call
from lightning_cco.graph.origins import Origin, is_constant

_NAMED_LOSS = re.compile(r"([Ll]oss|[Cc]riterion)(?![a-z])")
_LOSSES = re.compile(r".*_loss$|(binary_)?cross_entropy(_with_logits)?$|kl_div$")
"""Kinds of operation that compare what a network gave with what was wanted."""


@dataclass(frozen=True)
class End:
    """A tensor that a module gave.

    Attributes:
        key: Where in its result.
        shape: Its shape.
        dtype: Its data type, written without ``torch.``.
        quantizable: Whether it holds floats of ordinary size.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    quantizable: bool

    @property
    def is_number(self) -> bool:
        """Whether it is a single floating-point number."""
        return not self.shape and "float" in self.dtype


_Output = tuple[int, int]
"""A call and which of its outputs."""


@dataclass
class OuterCall:
    """One call of a module from outside of any other.

    Attributes:
        path: Dotted path of the module; empty for the root.
        module: The module.
        first: Number of the first call in it.
        learned: Whether it may be the network's: it has floating-point parameters, or the whole model has none, and is no metric.
        end: Number of the first call after it.
        returned: The tensors that it gave, and where each comes from.
    """

    path: str
    module: nn.Module
    first: int
    learned: bool
    end: int = 0
    returned: list[tuple[End, Origin]] = field(default_factory=list)

    @property
    def measures(self) -> bool:
        """Whether it gives nothing but single numbers, or is called a loss."""
        floats = [end for end, _ in self.returned if "float" in end.dtype]
        return bool(_NAMED_LOSS.search(type(self.module).__name__)) or (bool(floats) and all(end.is_number for end in floats))


def has_parameters(module: nn.Module) -> bool:
    """Whether a module, or a part of it, has floating-point parameters."""
    return any(parameter.is_floating_point() for parameter in module.parameters())


def is_metric(module: nn.Module) -> bool:
    """Whether a module is a metric of torchmetrics, some of which hold networks of their own."""
    return any(kind.__module__.startswith("torchmetrics.") for kind in type(module).__mro__)


def is_frozen(module: nn.Module) -> bool:
    """Whether nothing of a module is trained."""
    return not any(parameter.requires_grad for parameter in module.parameters())


@dataclass
class NetworkCalls:
    """What of the calls that were seen is the network.

    Attributes:
        calls: Numbers of its calls.
        ends: Its outputs by where they come from: what they are.
        left_out: Modules with parameters that ran, but for losses alone.
        called: Paths of the modules that the step calls for it.
    """

    calls: set[int]
    ends: dict[_Output, End]
    left_out: list[str]
    called: tuple[str, ...]


def find_network(outer: Sequence[OuterCall], calls: Sequence[Call]) -> NetworkCalls:
    """Tell the network from losses, metrics and augmentations.

    A module with parameters is part of it unless it is a metric, or a loss among other modules: one that is called so, gives only single numbers, or is
    frozen and compares features of what the network made with those of what came in.

    Args:
        outer: The calls of modules from outside of any other, in order.
        calls: All that was seen.
    """
    chosen = _network_calls(outer, calls)
    inside = {number for one in chosen for number in range(one.first, one.end)} if chosen else set(range(len(calls)))
    kept = ancestors(calls, inside)
    ends = _ends(chosen or outer, calls, kept)
    losses = _loss_outputs(ends, calls)
    if losses:
        ends = {origin: end for origin, end in ends.items() if origin not in losses} or _compared(losses, calls)
        kept -= _serving(losses, ends, calls, kept)
    return NetworkCalls(kept, ends, _left_out(outer, calls, kept), tuple(dict.fromkeys(one.path for one in chosen)))


def _network_calls(outer: Sequence[OuterCall], calls: Sequence[Call]) -> list[OuterCall]:
    learned = [one for one in outer if one.learned]
    trained = any(not is_frozen(one.module) for one in learned)
    chosen = [one for one in learned if not one.measures and not (trained and is_frozen(one.module) and _compares(one, learned, calls))]
    return chosen or learned


def _compares(call: OuterCall, learned: Sequence[OuterCall], calls: Sequence[Call]) -> bool:
    """Whether a frozen module sees both what other modules made and what came in (a perceptual loss)."""
    others = {number for one in learned if one.path != call.path for number in range(one.first, one.end) if calls[number].layer.parameters}
    behind = []
    for one in learned:
        if one.path == call.path:
            own = set(range(one.first, one.end))
            behind.append(bool((ancestors(calls, own) - own) & others))
    return any(behind) and not all(behind)


def ancestors(calls: Sequence[Call], numbers: Iterable[int]) -> set[int]:
    """The calls that others read from, however far up, themselves included."""
    found = set(numbers)
    pending = list(found)
    while pending:
        for read in calls[pending.pop()].reads:
            if read.source not in found:
                found.add(read.source)
                pending.append(read.source)
    return found


def _ends(outer: Sequence[OuterCall], calls: Sequence[Call], kept: set[int]) -> dict[_Output, End]:
    """What the last call gave, and what earlier ones gave and nothing read afterwards."""
    read = {(r.source, r.output) for number in kept for r in calls[number].reads}
    last = {origin for _, origin in outer[-1].returned} if outer else set()
    ends: dict[_Output, End] = {}
    for one in outer:
        for end, origin in one.returned:
            if not is_constant(origin) and (origin not in read or origin in last):
                ends.setdefault(origin, end)
    return ends


def _loss_outputs(ends: dict[_Output, End], calls: Sequence[Call]) -> set[_Output]:
    """Outputs that are single numbers made of many, beside outputs that are not or after an operation that compares."""
    numbers = {origin for origin, end in ends.items() if end.is_number and _reduced(origin, calls)}
    if len(numbers) < len(ends) or _compared(numbers, calls):
        return numbers
    return set()


def _reduced(origin: _Output, calls: Sequence[Call]) -> bool:
    """Whether a single number is made of more than one."""
    pending, seen = [origin[0]], set()
    while pending:
        number = pending.pop()
        if number in seen:
            continue
        seen.add(number)
        for shape, read in zip(calls[number].layer.input_shapes, calls[number].reads, strict=False):
            if any(size != 1 for size in shape):
                return True
            pending.append(read.source)
    return False


def _compared(losses: set[_Output], calls: Sequence[Call]) -> dict[_Output, End]:
    """What of the network the losses are worked out of."""
    above = ancestors(calls, {number for number, _ in losses})
    found: dict[_Output, End] = {}
    for number in sorted(above):
        if _LOSSES.match(calls[number].layer.kind):
            for read in calls[number].reads:
                if any(calls[one].layer.parameters for one in ancestors(calls, {read.source})):
                    layer = calls[read.source].layer
                    found[read.source, read.output] = End(
                        "", layer.output_shapes[read.output], layer.output_dtypes[read.output], read.quantizable
                    )
    return found


def _serving(losses: set[_Output], ends: Iterable[_Output], calls: Sequence[Call], kept: set[int]) -> set[int]:
    """Calls that nothing but losses is worked out of."""
    readers: dict[int, set[int]] = {}
    for number in kept:
        for read in calls[number].reads:
            readers.setdefault(read.source, set()).add(number)
    needed = {number for number, _ in ends}
    gone: set[int] = set()
    for number in sorted(ancestors(calls, {number for number, _ in losses}), reverse=True):
        if number not in needed and all(reader in gone for reader in readers.get(number, ())):
            gone.add(number)
    return gone


def _left_out(outer: Sequence[OuterCall], calls: Sequence[Call], kept: set[int]) -> list[str]:
    """Modules whose calls read parameters, none of which is kept."""
    read = {name for number in kept for name in calls[number].layer.parameters}
    found: dict[str, None] = {}
    for number, call in enumerate(calls):
        if number not in kept and call.layer.parameters and not read.intersection(call.layer.parameters):
            found[call.layer.path or "the model itself"] = None
    return list(found)
