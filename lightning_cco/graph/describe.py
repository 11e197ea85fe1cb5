"""The arguments that describe a layer: kernel size, stride, features and so on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_cco.graph.ops import Category, Op

_OF_MODULES = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "in_features", "out_features", "num_embeddings",
    "embedding_dim", "num_features", "normalized_shape", "eps", "output_size", "scale_factor", "mode", "p", "negative_slope", "input_size",
    "divisor_override", "ceil_mode", "hidden_size", "num_layers", "bidirectional", "num_heads", "embed_dim", "num_groups", "value",
)  # fmt: skip


def attributes(
    op: Op, module: nn.Module | None, args: tuple[Any, ...], kwargs: Mapping[str, Any], weight: Tensor | None
) -> dict[str, object]:
    """Collect the attributes of one call.

    Args:
        op: What it is.
        module: The module that made the call, if it is a leaf: its own attributes say more than the call's.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        weight: The weight it multiplies by, if any.

    Returns:
        Plain values by name; ``bias`` tells whether there is one.
    """
    found: dict[str, object] = {}
    if module is not None and next(module.children(), None) is None and module.__class__.__module__.startswith("torch.nn"):
        for name in _OF_MODULES:
            value = getattr(module, name, None)
            if isinstance(value, (int, float, str, bool, tuple)):
                found[name] = value
    else:
        if weight is not None:
            found["weight_shape"] = tuple(weight.shape)
        for name, value in zip(op.arguments, args, strict=False):
            if name and isinstance(value, (int, float, str, bool, tuple, list)):
                found[name] = tuple(value) if isinstance(value, list) else value
        for name, value in kwargs.items():
            if isinstance(value, (int, float, str, bool, tuple, list)) and name in op.arguments:
                found[name] = tuple(value) if isinstance(value, list) else value
    if not found.get("ceil_mode"):
        found.pop("ceil_mode", None)
    if op.kind == "batch_norm" and not _uses_running_statistics(args, kwargs):
        found["running_statistics"] = False
    if weight is not None and op.biased:
        found["bias"] = isinstance(args[2] if len(args) > 2 else kwargs.get("bias"), Tensor)
    return found | _limits(op, args, kwargs)


def _uses_running_statistics(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a batch norm normalizes by statistics that it is given, not by those of the batch."""
    mean = args[1] if len(args) > 1 else kwargs.get("running_mean")
    return isinstance(mean, Tensor) and not (args[5] if len(args) > 5 else kwargs.get("training", False))


def _limits(op: Op, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, object]:
    """Whether a clamp's limits are tensors: such a clamp has no operator of its own in files."""
    given = (*args[1:], kwargs.get("min"), kwargs.get("max")) if op.category is Category.CLAMP else ()
    return {"limits": "of a tensor"} if any(isinstance(limit, Tensor) for limit in given) else {}
