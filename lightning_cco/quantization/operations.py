"""Some of the kernels as operations of PyTorch, so that compilers can put them into their graphs.

A compiler fuses the rounding itself with what is around, which no kernel can. But its reductions are slow: over the channels of a weight, and over a whole
activation, for which it computes all that is fused before it once more. What the operations return is equal to the last bit to what runs eagerly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cco.quantization.layouts import is_dense
from lightning_cco.quantization.native import FORMATS, Kernels, load

_library = torch.library.Library("lightning_cco", "DEF")  # type: ignore[no-untyped-call]
_TAGS = (torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag)  # any layout will do: nothing has to be copied before
for _schema in (
    "widened(Tensor extrema, Tensor x, float below, float above) -> Tensor",
    "weight_scale(Tensor weight, int axis, int limit, float smallest, bool mse=False) -> Tensor",
    "affine_weight_scale(Tensor rows, int last, float smallest, bool mse=False) -> Tensor",
):
    _library.define(_schema, tags=_TAGS)  # type: ignore[no-untyped-call]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _loaded() -> bool:
    return load() is not None


def has_operations(x: Tensor) -> bool:
    """Whether a compiler is at work and may put the operations for a tensor into its graph. An exported graph must run where this package is not."""
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    return x.device.type == "cpu" and x.dtype in FORMATS and _loaded()


def widened(extrema: Tensor, x: Tensor, limits: tuple[float, float]) -> Tensor:
    """Smallest and largest of two numbers and of all values after a clamp.

    Args:
        extrema: The two numbers, float32 of 2.
        x: The values, any shape.
        limits: The clamp.
    """
    result: Tensor = torch.ops.lightning_cco.widened(extrema, x, *limits)
    return result


def weight_scale(weight: Tensor, axis: int, limit: int, smallest: float, mse: bool = False) -> Tensor:
    """Scale of each channel: its largest magnitude divided by the largest level, or the one at which rounding and clipping lose least.

    Args:
        weight: Any shape.
        axis: Axis of the channels.
        limit: Largest level.
        smallest: Least scale.
        mse: Whether it is the latter.

    Returns:
        float32 of the weight's number of dimensions, size 1 except along ``axis``.
    """
    result: Tensor = torch.ops.lightning_cco.weight_scale(weight, axis, limit, smallest, mse)
    return result


def affine_weight_scale(rows: Tensor, last: int, smallest: float, mse: bool = False) -> Tensor:
    """Scale and level of 0 of each row of weights.

    Args:
        rows: (rows, values of each).
        last: Last level; the first one is 0.
        smallest: Least scale.
        mse: Whether the scales are those at which rounding and clipping lose least.

    Returns:
        float32, (2, rows).
    """
    result: Tensor = torch.ops.lightning_cco.affine_weight_scale(rows, last, smallest, mse)
    return result


def _kernels() -> Kernels:
    kernels = load()
    assert kernels is not None, "the graph was compiled where there were kernels"
    return kernels


def _run_widened(extrema: Tensor, x: Tensor, below: float, above: float) -> Tensor:
    result = extrema.clone()
    _kernels().widen(x if is_dense(x) else x.contiguous(), (below, above), result)
    return result


def _run_weight_scale(weight: Tensor, axis: int, limit: int, smallest: float, mse: bool = False) -> Tensor:
    result = torch.empty(_shape(weight, axis), dtype=torch.float32, device=weight.device)
    _kernels().weight_scale(weight.contiguous(), axis, limit, smallest, result, mse)
    return result


def _run_affine_weight_scale(rows: Tensor, last: int, smallest: float, mse: bool = False) -> Tensor:
    result = _fake_affine_weight_scale(rows, last, smallest)
    _kernels().affine_weight_scale(rows.contiguous(), last, smallest, result, mse)
    return result


def _shape(weight: Tensor, axis: int) -> list[int]:
    return [size if dim == axis else 1 for dim, size in enumerate(weight.shape)]


def _fake_widened(extrema: Tensor, x: Tensor, below: float, above: float) -> Tensor:
    return torch.empty_like(extrema)


def _fake_weight_scale(weight: Tensor, axis: int, limit: int, smallest: float, mse: bool = False) -> Tensor:
    return weight.new_empty(_shape(weight, axis), dtype=torch.float32)


def _fake_affine_weight_scale(rows: Tensor, last: int, smallest: float, mse: bool = False) -> Tensor:
    return rows.new_empty((2, rows.shape[0]), dtype=torch.float32)


for _name, _run, _fake in (
    ("widened", _run_widened, _fake_widened),
    ("weight_scale", _run_weight_scale, _fake_weight_scale),
    ("affine_weight_scale", _run_affine_weight_scale, _fake_affine_weight_scale),
):
    _library.impl(_name, _run, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"lightning_cco::{_name}", _fake, lib=_library)
