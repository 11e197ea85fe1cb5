"""What a capture has not reached, or must not be quantized though it was: modules that run out of sight, and frozen ones that only training asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cco.compat.dynamo import TAKE_FUNCTIONS
from lightning_cco.graph.containers import tensors_held
from lightning_cco.graph.layer import Layer
from lightning_cco.graph.network import is_metric
from lightning_cco.graph.operands import MASKING
from lightning_cco.graph.ops import is_known_kind
from lightning_cco.graph.saved_values import is_same
from lightning_cco.graph.snapshot import Snapshot
from lightning_cco.graph.trace import Tracer
from lightning_cco.names import is_within

_OUT_OF_SIGHT = TAKE_FUNCTIONS | {"custom_function"}
"""Kinds of layers that run code which is not seen."""
_NAMED_APART = _OUT_OF_SIGHT | MASKING | {"unseen", "output"}
"""What reads weights otherwise than by a function, is named by itself, or chooses between values."""


def out_of_sight(model: nn.Module, tracer: Tracer) -> list[str]:
    """Say of each module with floating-point parameters that ran, or may have run, unseen why it is not in the layer graph.

    Args:
        model: The model.
        tracer: What was seen of a forward of it.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    read = _read(named, tracer)
    apart, partly = in_other_threads(tracer), partly_in_other_threads(tracer)
    found = [
        f"'{path}' ({type(module).__name__}: it was called in another thread than the forward, where calls are not captured)"
        for path, module in model.named_modules()
        if path in apart and any(p.is_floating_point() for p in module.parameters())
    ]
    found += [
        f"'{path}' ({type(module).__name__}: some of its calls are made in another thread than the forward, where calls are not captured)"
        for path, module in model.named_modules()
        if path in partly and any(p.is_floating_point() for p in module.parameters())
    ]
    scripted = ""
    for path, module in model.named_modules():
        if scripted and path.startswith(f"{scripted}."):
            continue
        if isinstance(module, torch.jit.ScriptModule):
            scripted = path
            if any(p.is_floating_point() for p in module.parameters()):
                exported = "; nor can a scripted module be exported" if is_scripted(module) else ""
                found.append(
                    f"'{path or 'the model itself'}' ({type(module).__name__}: TorchScript, what it computes can't be seen{exported})"
                )
            continue
        own = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        leaf = next(module.children(), None) is None
        if leaf and own and path in tracer.ran and not any(id(p) in read for p in own):
            found.append(
                f"'{path or 'the model itself'}' ({type(module).__name__}: it ran, but no torch function was seen to read its parameters: "
                "a scripted function, NumPy, an extension, or it does not use them)"
            )
    for call in tracer.calls:
        weights = [name for name in call.layer.parameters if name in named and named[name].dim() > 1]
        if call.layer.kind in _OUT_OF_SIGHT and weights:
            found.append(f"'{call.layer.path or 'the model itself'}' ({call.layer.note}; it reads {', '.join(weights)})")
    return found


def in_other_threads(tracer: Tracer) -> list[str]:
    """The outermost modules that the forward calls in other threads alone."""
    return _outermost(tracer.apart - tracer.ran)


def partly_in_other_threads(tracer: Tracer) -> list[str]:
    """The outermost modules that it calls both there and in its own."""
    return _outermost(tracer.apart & tracer.ran, in_other_threads(tracer))


def _outermost(paths: Iterable[str], around: Sequence[str] = ()) -> list[str]:
    """Those of some modules that are no parts of others of them, nor of those that are given as well."""
    found: list[str] = []
    for path in sorted(paths):
        if not is_within(path, [*around, *found]):
            found.append(path)
    return found


def without_int8_form(model: nn.Module, tracer: Tracer) -> list[str]:
    """Say of each weight that no layer of the table reads which function does: a custom operator, one of complex numbers, `torch.cdist`.

    Args:
        model: The model.
        tracer: What was seen of a forward of it.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    others = {name for call in tracer.calls if _may_have_form(call.layer) for name in call.layer.parameters}
    found: dict[str, None] = {}
    for call in tracer.calls:
        layer = call.layer
        weights = [name for name in layer.parameters if name in named and _is_matrix(named[name]) and name not in others]
        if not weights or not call.reads or layer.kind in _NAMED_APART:
            continue
        what = f"{layer.kind} of complex numbers" if _is_complex(layer) else layer.kind
        what = f"{layer.kind}, a custom operator" if layer.kind in tracer.custom else what
        what = "matrices chosen by indices" if layer.kind == "lookup" else what
        where = f"module '{layer.path}'" if layer.path else "the model itself"
        found[f"{', '.join(map(repr, weights))} ({what}, in {where})"] = None
    return list(found)


def _is_matrix(weight: Tensor) -> bool:
    """Whether it has rows and columns: tokens that stand for what is missing, and factors of channels, are single rows."""
    return sum(size > 1 for size in weight.shape) > 1


def _may_have_form(layer: Layer) -> bool:
    """Whether it is in the table, so that log and plan say what becomes of its weights."""
    if layer.kind == "lookup":  # rows of a table are an embedding; matrices out of a stack of them are weights, chosen anew for each input
        return len(layer.output_shapes[0]) - len(layer.input_shapes[0]) < 2
    return (layer.weighted or is_known_kind(layer.kind)) and not _is_complex(layer)


def _is_complex(layer: Layer) -> bool:
    return any("complex" in dtype for dtype in (*layer.input_dtypes, *layer.output_dtypes))


def is_scripted(module: nn.Module) -> bool:
    """Whether `torch.jit.script` has made a module, which `torch.export` can't trace, unlike what `torch.jit.trace` makes."""
    return isinstance(module, torch.jit.ScriptModule) and not isinstance(module, torch.jit.TopLevelTracedModule)  # type: ignore[attr-defined]


def _read(named: Mapping[str, Tensor], tracer: Tracer) -> set[int]:
    """Identities of the parameters that calls were seen to read."""
    names = {name for call in tracer.calls for name in call.layer.parameters} | tracer.read
    return {id(named[name]) for name in names if name in named}


def used_unseen(model: nn.Module, tracer: Tracer, forward: Callable[[], Any]) -> list[str]:
    """Names of the weights that no call was seen to read, though the output depends on them: found by changing them, in up to a few forwards.

    Args:
        model: The model, in the mode that was traced.
        tracer: What was seen of a forward of it.
        forward: Runs the example through it, with the same random numbers each time.
    """
    named = dict(model.named_parameters())
    read = _read(dict(model.named_parameters(remove_duplicate=False)), tracer)
    scripted = [path for path, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    metrics = [path for path, module in model.named_modules() if is_metric(module)]
    leaves = [path for path, module in model.named_modules() if next(module.children(), None) is None and path in tracer.ran]
    apart = in_other_threads(tracer)
    unread = [
        name
        for name, p in named.items()
        if id(p) not in read and p.dim() > 1 and p.is_floating_point() and type(p) is nn.Parameter and p.layout is torch.strided
        if not is_within(name, [path for path in (*scripted, *metrics, *leaves, *apart) if path])  # these are named by themselves
    ]
    if not unread or "" in scripted:
        return []

    def output(changed: Sequence[str]) -> list[Tensor]:
        before = [named[name].detach().clone() for name in changed]
        try:
            with torch.no_grad():
                for name in changed:
                    named[name].mul_(1.5).add_(0.25)
            torch.manual_seed(0)
            with Snapshot(model):
                return [tensor.detach().clone() for _, tensor in tensors_held(forward())]
        finally:
            with torch.no_grad():
                for name, value in zip(changed, before, strict=True):
                    named[name].copy_(value)

    try:
        wanted = output([])

        def matter(names: Sequence[str]) -> bool:
            now = output(names)
            return len(now) != len(wanted) or not all(map(is_same, now, wanted))

        return (
            [] if matter([]) else _not_copied(_those_that(matter, unread), named, tracer)
        )  # where results differ each time, nothing can be told
    except Exception:  # a step that gives nothing to compare, or a forward that these weights make fail
        return []


def _not_copied(names: Sequence[str], named: Mapping[str, Tensor], tracer: Tracer) -> list[str]:
    """Those of which no copy was multiplied by: a weight without a name, of the same shape."""
    copies = Counter(w.shape for call in tracer.calls if call.layer.weighted for w in call.weights if not w.parameters)
    found = []
    for name in names:
        if copies[tuple(named[name].shape)]:
            copies[tuple(named[name].shape)] -= 1
        else:
            found.append(name)
    return found


def _those_that(matter: Callable[[Sequence[str]], bool], names: Sequence[str]) -> list[str]:
    """The names of which some matter together, by halves."""
    if not names or not matter(names):
        return []
    if len(names) == 1:
        return list(names)
    half = len(names) // 2
    return _those_that(matter, names[:half]) + _those_that(matter, names[half:])


def frozen_modules(model: nn.Module) -> list[str]:
    """The outermost modules whose parameters are all frozen, in a model that has others."""
    if not any(p.requires_grad for p in model.parameters()):
        return []
    found: list[str] = []
    for path, module in model.named_modules():
        parameters = list(module.parameters())
        if path and parameters and not any(p.requires_grad for p in parameters) and not is_within(path, found):
            found.append(path)
    return found


def only_asked(model: nn.Module, evaluation: Tracer, training: Tracer | None) -> list[str]:
    """Frozen modules that training runs without gradients, and whose results no trained layer reads: teachers, averaged copies, momentum encoders.

    A frozen part of the deployed model differs in the last point: trained layers read what it makes.
    """
    if training is None or not training.with_gradients:
        return []
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = []
    for path in frozen_modules(model):
        ran = [p for p in training.ran if is_within(p, [path])]
        if not ran or any(p in training.with_gradients for p in ran):
            continue
        reached = {number for number, call in enumerate(evaluation.calls) if is_within(call.layer.path, [path])}
        trained = False
        for number, call in enumerate(evaluation.calls):
            if any(read.source in reached for read in call.reads):
                reached.add(number)
                trained = trained or any(name in parameters and parameters[name].requires_grad for name in call.layer.parameters)
        if not trained:
            found.append(path)
    return found
