"""Parts of a model that somebody else has quantized: told by their classes, by their tensors, and by what the forward calls."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.graph.captured import Capture
from lightning_cco.graph.layer import Layer
from lightning_cco.graph.network import has_parameters
from lightning_cco.names import is_within, list_names

_MODULES = re.compile(
    r"torch\.ao\.nn\.(intrinsic\.|sparse\.)?(quantized|qat)\b|torch\.ao\.quantization\.(observer|fake_quantize)\b"
    r"|(torchao|optimum\.quanto|auto_gptq|gptqmodel|awq|hqq|brevitas|nncf|pytorch_quantization|modelopt\.torch\.quantization|aimet_torch)\."
)
"""Where classes of modules come from that quantize what they compute, or will."""
_CLASSES = re.compile(r"bitsandbytes\..*\.(Linear|Embedding)(4bit|8bit|8bitLt|FP4|NF4)")
_IN_FLOAT = frozenset(("FloatFunctional", "FXFloatFunctional"))
"""Classes among these modules that compute in float until somebody converts them."""
_TENSORS = re.compile(r"(torchao|bitsandbytes|optimum\.quanto|hqq)\.")
_STORED = frozenset((torch.int8, torch.uint8, torch.int16, torch.int32))
"""Types of integers that weights are stored in; indices have 64 bits."""
_CALLS = re.compile(r"quantize_per_(tensor|channel|token)|dequantize|quantized_\w+")
"""Kinds of layers that compute with integers already."""


def refuse_quantized_parts(model: nn.Module, captured: Capture) -> None:
    """Refuse a model of which a part that runs is quantized by somebody else: it would be rounded twice, or its integers taken for floats.

    What training only asks, such as a teacher, and what serves losses alone, may be.

    Raises:
        CCOError: There is such a part; the message names it. Or the model has no parameter.
    """
    asked = [*{layer.frozen for layer in captured.graph if layer.frozen}, *captured.left_out]
    ran = {node.path for node in captured.root.walk() if not is_within(node.path, asked)}
    modules = {path: module for path, module in model.named_modules() if path in ran or is_within(path, captured.apart)}
    found: dict[str, str] = {}
    for path, module in modules.items():
        if not is_within(path, found) and (what := _of_somebody_else(module)):
            found[path] = what
    for layer in captured.graph:
        if _CALLS.fullmatch(layer.kind) and not layer.frozen and not is_within(layer.path, [path for path in found if path]):
            found.setdefault(layer.path, f"it calls {layer.kind}")
    if found:
        parts = [f"'{path or 'the model itself'}' ({what})" for path, what in found.items()]
        raise CCOError(
            f"{type(model).__name__}: parts of it are quantized already, by something else: {'; '.join(parts[:5])}{'; …' if len(parts) > 5 else ''}. "
            "Quantize the float model, before any other conversion, or leave those parts out of the forward that is captured."
        )
    if not has_parameters(model):
        raise CCOError(
            f"{type(model).__name__}: it has no floating-point parameter, so there is nothing to quantize. "
            "Quantize the float model, before any other conversion, after its layers are built."
        )
    _warn_of_integers(model, captured, modules)


def _of_somebody_else(module: nn.Module) -> str:
    """What tells that a module is quantized already; empty if nothing does."""
    for kind in type(module).__mro__:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if kind.__qualname__ not in _IN_FLOAT and (_MODULES.match(name) or _CLASSES.match(name)):
            return f"{type(module).__module__}.{type(module).__name__}"
    for name, tensor in _own_tensors(module):
        kind = type(tensor)
        if tensor.is_quantized or _TENSORS.match(f"{kind.__module__}."):
            return f"its {name} is a {f'{kind.__module__}.{kind.__name__}' if kind.__module__.split('.')[0] != 'torch' else tensor.dtype}"
    return ""


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _warn_of_integers(model: nn.Module, captured: Capture, modules: dict[str, nn.Module]) -> None:
    """Say which weights a forward makes of integers: they are rounded once more."""
    found: dict[str, None] = {}
    named = dict(model.named_parameters())
    for layer in captured.graph:
        own = {_named(layer, name): tensor for name, tensor in _own_tensors(modules[layer.path])} if layer.path in modules else {}
        for weight in captured.sites[layer.name].weights if layer.weighted else ():
            held = {name: named[name] for name in weight.parameters if name in named} or own
            found.update(dict.fromkeys(name for name, tensor in held.items() if len(weight.shape) > 1 and _is_stored(tensor, weight.shape)))
    if found:
        warnings.warn(
            f"{type(model).__name__}: weights are made of integers, {list_names(list(found))}, so another tool has quantized them. They are not trained, "
            "and their values are rounded once more. Quantize the float model instead, or skip their layers: skip_quantization: true.",
            CCOWarning,
            stacklevel=4,
        )


def _is_stored(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a weight of this shape may be made of a tensor of integers."""
    return tensor.dtype in _STORED and tensor.dim() > 1 and tensor.shape.numel() in _packed(shape)


def _packed(shape: tuple[int, ...]) -> set[int]:
    """How many integers may hold the values of a weight: one each, or one for 2, 4 or 8."""
    return {math.prod(shape) // count for count in (1, 2, 4, 8)}


def _named(layer: Layer, name: str) -> str:
    return f"{layer.path}.{name}" if layer.path else name
