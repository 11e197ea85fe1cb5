"""Which arguments of a forward are labels, or ask for a loss: without them the model gives the same outputs, but no loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_cco.export.forward_signature import ForwardSignature
from lightning_cco.export.nested_tensors import leaves

_LABELS = ("label", "labels", "target", "targets", "y", "y_true", "start_positions", "end_positions")


def find_labels(arguments: dict[str, Any], signature: ForwardSignature, call: Callable[[dict[str, Any]], Any]) -> list[str]:
    """Optional arguments without which a single number, the loss, is no longer returned and all else is: labels, and flags such as ``return_loss=True``.

    Without those that are called labels other outputs may go, too: what losses are made of is returned beside them (predictions of earlier layers).

    Args:
        arguments: Bound arguments of the example.
        signature: Of the forward.
        call: Calls the forward with bound arguments.
    """
    optional = [
        name for name in signature.optional(arguments) if any(isinstance(v, Tensor) or v is True for _, v in leaves(_find(arguments, name)))
    ]
    if not optional:
        return []
    whole = _outputs(call, arguments)
    if whole is None or not any(_is_loss(value) for value in whole):
        return []
    labels = [name for name in optional if _is_label(name, whole, _outputs(call, signature.without(arguments, [name])))]
    more = [name for name in optional if labels and name not in labels and name in _LABELS]
    return labels + [name for name in more if _outputs(call, signature.without(arguments, [*labels, name])) is not None]


def _find(arguments: Mapping[str, Any], name: str) -> Any:
    return arguments[name] if name in arguments else next((v[name] for v in arguments.values() if isinstance(v, dict) and name in v), None)


def _outputs(call: Callable[[dict[str, Any]], Any], arguments: dict[str, Any]) -> list[Tensor] | None:
    try:
        return [value for _, value in leaves(call(arguments)) if isinstance(value, Tensor)]
    except Exception:  # it is needed after all
        return None


def _is_loss(value: Tensor) -> bool:
    return value.dim() == 0 and value.is_floating_point()


def _is_label(name: str, whole: list[Tensor], less: list[Tensor] | None) -> bool:
    if not less or sum(map(_is_loss, less)) >= sum(map(_is_loss, whole)):
        return False
    others = [value for value in whole if not _is_loss(value)]
    rest = [value for value in less if not _is_loss(value)]
    if not others:
        return bool(rest)
    only_losses = len(rest) >= len(others) and _all_in(others, rest)
    return only_losses or (name in _LABELS and bool(rest) and _all_in(rest, others))


def _all_in(values: list[Tensor], others: list[Tensor]) -> bool:
    return all(
        any(value.shape == same.shape and torch.allclose(value.double(), same.double(), equal_nan=True, atol=1e-4) for same in others)
        for value in values
    )
