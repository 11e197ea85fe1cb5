"""What a capture has not reached, or must not be quantized though it was: modules that run out of sight, and frozen ones that only training asks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lightning_cco.graph.trace import Tracer


def out_of_sight(model: nn.Module, tracer: Tracer) -> list[str]:
    """Say of each module with floating-point parameters that ran, or may have run, unseen why it is not in the layer graph.

    Args:
        model: The model.
        tracer: What was seen of a forward of it.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    reads = {name for call in tracer.calls for name in call.layer.parameters} | tracer.read
    read = {id(named[name]) for name in reads if name in named}
    found: list[str] = []
    scripted = ""
    for path, module in model.named_modules():
        if scripted and path.startswith(f"{scripted}."):
            continue
        if isinstance(module, torch.jit.ScriptModule):
            scripted = path
            if any(p.is_floating_point() for p in module.parameters()):
                found.append(f"'{path or 'the model itself'}' ({type(module).__name__}: TorchScript, what it computes can't be seen)")
            continue
        own = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        leaf = next(module.children(), None) is None
        if leaf and own and path in tracer.ran and not any(id(p) in read for p in own):
            found.append(
                f"'{path or 'the model itself'}' ({type(module).__name__}: it ran, but no torch function was seen to read its parameters: "
                "a scripted function, NumPy, an extension, or it does not use them)"
            )
    return found


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


def is_within(path: str, modules: Iterable[str]) -> bool:
    """Whether a path is that of one of the modules, or of a part of one."""
    return any(path == module or path.startswith(f"{module}.") for module in modules)


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
