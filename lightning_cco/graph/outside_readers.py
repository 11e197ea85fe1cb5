"""Tensors that are read outside of the network, by hooks, losses, logs and code that stores them: these readers get the values of the float run."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_cco.compat.modules import CONTENTS, OF_MODULES, forward_hooks, forward_pre_hooks, global_forward_hooks
from lightning_cco.graph.call import Call
from lightning_cco.graph.containers import tensors_held, tensors_in
from lightning_cco.graph.layer import FLOATS
from lightning_cco.graph.network import NetworkCalls, ancestors
from lightning_cco.graph.origins import Origins, is_constant
from lightning_cco.graph.records import Operand

Output = tuple[int, int]
"""A call and which of its outputs."""

_OURS = ("torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_cco", "accelerate", "deepspeed", "peft", "transformers")
"""Packages whose hooks make weights, move tensors or count, and keep nothing that is computed with; transformers' collect what the model then returns."""


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


class ValueReaders:
    """Collects, while a forward is watched, the outputs of calls whose very values somebody reads who is no layer of the network.

    Args:
        model: The model.
        origins: Where each tensor comes from.
        calls: The calls so far; the tracer adds to them.

    Attributes:
        hooked: Paths of the modules with hooks that may read what passes.
    """

    def __init__(self, model: nn.Module, origins: Origins, calls: list[Call]) -> None:
        self._model, self._origins, self._calls = model, origins, calls
        self.hooked = hooked_modules(model)
        self._passed: set[Output] = set()
        self._read_out: set[Output] = set()

    def note_passed(self, path: str, value: Any) -> None:
        """Note what a module is given or gives, if hooks of the user's see it."""
        if path not in self.hooked:
            return
        with torch.DisableTorchFunction():
            origins = [self._origins.of(tensor) for _, tensor in tensors_held(value)]
        self._passed.update(_outputs(origins))

    def note_read_out(self, operands: Sequence[Operand]) -> None:
        """Note floats whose very values a call reads: rounding them would give others."""
        for _, tensor, origin in operands:
            if tensor.is_floating_point() and not is_constant(origin):
                self._read_out.add((origin[0], origin[1]))

    def found(self, network: NetworkCalls) -> set[Output]:
        """The outputs that are read by Python, hooks, losses, and who keeps a tensor."""
        losses = read_by((number for number in range(len(self._calls)) if number not in network.calls), self._calls)
        read = {output for output in self._passed | losses | self._kept() if self._may_be_rounded(output)}
        return read - set(network.ends) | self._read_out

    def _kept(self) -> set[Output]:
        """The outputs that somebody still holds. Where gradients are recorded that may be their graph, so only modules are asked."""
        if any(call.training for call in self._calls) or torch.is_grad_enabled():
            return self._kept_in_modules()
        if not self._held():
            return set()
        gc.collect(0)  # cycles of objects that the forward has made are alive as well, until somebody looks
        return self._held()

    def _held(self) -> set[Output]:
        return {output for output in _outputs(origin for _, origin in self._origins.alive()) if self._may_be_rounded(output)}

    def _kept_in_modules(self) -> set[Output]:
        """Outputs that attributes of modules hold, for a loss or a log to read later."""
        found: set[Output] = set()
        for module in self._model.modules():
            held = {name: value for name, value in vars(module).items() if name not in OF_MODULES and name not in CONTENTS}
            found.update(_outputs(self._origins.of(tensor) for _, tensor in tensors_in(held)))
        return found

    def _may_be_rounded(self, output: Output) -> bool:
        """Whether an output is one of floats that may be rounded where it is made: no input, and nothing that the step makes between modules."""
        layer = self._calls[output[0]].layer
        real = output[1] < len(layer.output_dtypes) and layer.output_dtypes[output[1]] in FLOATS
        return real and layer.kind != "input" and not layer.outside


def _outputs(origins: Iterable[Any]) -> list[Output]:
    return [origin for origin in origins if isinstance(origin, tuple) and not is_constant(origin)]


def read_outside(calls: Sequence[Call]) -> set[int]:
    """Numbers of the calls that serve neither an output nor a layer with weights: losses, statistics, what is logged or kept."""
    ends = {number for number, call in enumerate(calls) if call.layer.kind == "output"}
    if not ends:
        return set()
    serving = ancestors(calls, ends | {number for number, call in enumerate(calls) if call.layer.weighted})
    return {number for number, call in enumerate(calls) if number not in serving and call.layer.kind != "input"}


def looked_at(aside: set[int], calls: Sequence[Call]) -> set[Output]:
    """What the calls outside of the network read of it; calls that overwrite a tensor which nobody reads afterwards look at nothing."""
    readers: dict[int, set[int]] = {}
    for number, call in enumerate(calls):
        for read in call.reads:
            readers.setdefault(read.source, set()).add(number)
    looking: set[int] = set()
    for number in sorted(aside, reverse=True):  # what reads a call comes after it
        if not calls[number].in_place or any(reader in looking or reader not in aside for reader in readers.get(number, ())):
            looking.add(number)
    return {output for output in read_by(looking, calls) if output[0] not in aside}


def read_by(numbers: Iterable[int], calls: Sequence[Call]) -> set[Output]:
    """The outputs that some calls read."""
    return {(read.source, read.output) for number in numbers for read in calls[number].reads}


def with_reader(call: Call, output: int) -> None:
    """Note that an output of a call is read outside of the network."""
    read_out = tuple(sorted({*call.layer.read_out, output}))
    call.layer = replace(call.layer, read_out=read_out)
