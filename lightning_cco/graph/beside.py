"""What is read beside the network, by hooks, losses, logs and whoever keeps a tensor: such readers get the values of the float run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_cco.compat.modules import CONTENTS, OF_MODULES, forward_hooks, forward_pre_hooks, global_forward_hooks
from lightning_cco.graph.call import Call
from lightning_cco.graph.containers import tensors_in
from lightning_cco.graph.network import ancestors
from lightning_cco.graph.origins import Origins, is_constant

Output = tuple[int, int]
"""A call and which of its outputs."""

_OURS = ("torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_cco", "accelerate", "deepspeed", "peft")
"""Packages whose hooks make weights, move tensors or count, and keep nothing that is computed with."""


def hooked_modules(model: nn.Module) -> frozenset[str]:
    """Paths of the modules with forward hooks of the user's own, or of another library's; of all of them if one is for all modules."""
    everywhere = any(map(_is_foreign, global_forward_hooks()))
    return frozenset(
        path
        for path, module in model.named_modules()
        if everywhere or any(map(_is_foreign, (*forward_hooks(module), *forward_pre_hooks(module))))
    )


def _is_foreign(hook: Any) -> bool:
    function = getattr(hook, "func", hook)  # of a partial
    place = getattr(function, "__module__", None) or type(function).__module__
    return str(place).partition(".")[0] not in _OURS


def kept_in_modules(model: nn.Module, origins: Origins) -> set[Output]:
    """Outputs that attributes of modules hold, for a loss or a log to read later."""
    found: set[Output] = set()
    for module in model.modules():
        held = {name: value for name, value in vars(module).items() if name not in OF_MODULES and name not in CONTENTS}
        for _, tensor in tensors_in(held):
            origin = origins.of(tensor)
            if isinstance(origin, tuple) and not is_constant(origin):
                found.add(origin)
    return found


def beside(calls: Sequence[Call]) -> set[int]:
    """Numbers of the calls that serve neither an output nor a layer with weights: losses, statistics, what is logged or kept."""
    ends = {number for number, call in enumerate(calls) if call.layer.kind == "output"}
    if not ends:
        return set()
    serving = ancestors(calls, ends | {number for number, call in enumerate(calls) if call.layer.weighted})
    return {number for number, call in enumerate(calls) if number not in serving and call.layer.kind != "input"}


def read_by(numbers: Iterable[int], calls: Sequence[Call]) -> set[Output]:
    """The outputs that some calls read."""
    return {(read.source, read.output) for number in numbers for read in calls[number].reads}


def with_reader(call: Call, output: int) -> None:
    """Note that an output of a call is read beside the network."""
    read_out = tuple(sorted({*call.layer.read_out, output}))
    call.layer = replace(call.layer, read_out=read_out)
