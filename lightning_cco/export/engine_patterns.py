"""The same computation in the operators that engines run fastest: products, poolings and first convolutions that they recognize."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_cco.export.errors import BatchDoesNotVary, ExportError


def has_matrix_units() -> bool:
    """Whether this processor multiplies matrices of 8-bit integers in units of their own (AMX)."""
    return bool(_capabilities().get("amx_int8", False))


def adds_products_exactly() -> bool:
    """Whether this processor adds products of unsigned and signed 8-bit integers without overflow: all but x86 without VNNI.

    There, engines use an instruction that adds two such products in 16 bits and cuts off what does not fit.
    """
    if platform.machine() not in ("x86_64", "AMD64", "i686", "x86"):
        return True
    found = _capabilities()
    if "avx512_vnni" in found or "avx_vnni" in found:
        return bool(found.get("avx512_vnni") or found.get("avx_vnni"))
    try:  # older versions of PyTorch can't tell
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return True
    return "avx512_vnni" in flags or "avx_vnni" in flags


def overflow_advice() -> str:
    """What to set for processors on which OpenVINO's sums of 8-bit products overflow."""
    here = "" if adds_products_exactly() else ", so on this one"
    return (
        f"on x86 processors without VNNI{here} OpenVINO's sums of 8-bit products overflow 16 bits: for them set deployment_settings.vnni: false, "
        "which gives weights 7 bits"
    )


def _capabilities() -> Mapping[str, Any]:
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)
    found: Mapping[str, Any] = capabilities()
    return found


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` without dropout, as two products and a softmax.

    What the exporter writes computes the shapes of the transposed key in every run.
    """
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = torch.matmul(query, key.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype is torch.bool else scores + attn_mask
    return torch.matmul(torch.softmax(scores, -1), value)


def added_apart(addend: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """`torch.addmm` as a product of three dimensions and an addition: engines have an INT8 kernel for a constant addend with factor 1 only.

    Of two dimensions they would put product and addition together again.
    """
    product = multiplied_apart(left, right)
    product = product if alpha == 1 else product * alpha
    return product + (addend if beta == 1 else addend * beta)


def multiplied_apart(left: Tensor, right: Tensor) -> Tensor:
    """A product of two matrices as one of three dimensions: what is added to one of two, engines put together with it, in float.

    >>> multiplied_apart(torch.ones(1, 2), torch.ones(2, 1)).tolist()
    [[2.0]]
    """
    return (left[None] @ right)[0] if left.dim() == right.dim() == 2 else left @ right


def divided(pool: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``avg_pool2d`` or ``avg_pool3d`` whose ``divisor_override``, which ONNX lacks, is a factor after it."""

    def pooled(*args: Any, **kwargs: Any) -> Tensor:
        divisor = args[6] if len(args) > 6 else kwargs.get("divisor_override")
        if divisor is None:
            return pool(*args, **kwargs)
        names = ("input", "kernel_size", "stride", "padding", "ceil_mode")
        call = {**dict(zip(names, args, strict=False)), **{name: kwargs[name] for name in names if name in kwargs}}
        if call.get("ceil_mode"):
            raise ExportError(
                "an average pooling with divisor_override= and ceil_mode=True has no operator in ONNX. Leave one of them out."
            )
        kernel = call["kernel_size"]
        dimensions = 3 if "3d" in getattr(pool, "__name__", "") else 2
        sizes = [kernel] * dimensions if isinstance(kernel, int) else list(kernel) * (dimensions // len(kernel))
        result: Tensor = pool(**call, count_include_pad=True) * (math.prod(sizes) / divisor)
        return result

    return pooled


def in_slices(split: Callable[..., Any]) -> Callable[..., Any]:
    """A split (``chunk``, ``split``, …) by slices, where the sizes of its parts follow from that of the batch: the exporter can't write them.

    How many parts there are is fixed in the file. Where that holds for some sizes alone, so that the last part would be wrong in others, the batch is said not
    to vary.

    >>> [len(part) for part in in_slices(torch.chunk)(torch.arange(5), 2)]
    [3, 2]
    """
    # The exporter can't write those that are called unsafe, since they are no views of one tensor; a file has no views.
    if split.__name__.startswith("unsafe_"):
        split = getattr(torch, split.__name__.removeprefix("unsafe_"))

    def parts(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = split(x, *args, **kwargs)
        if split.__name__ in _AXES:
            axis = min(_AXES[split.__name__], x.dim() - 1)
        else:
            axis = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        if isinstance(x.shape[axis], int):
            return found  # engines know a Split, also behind a product (`FileFeature.SPLIT_PRODUCTS`)
        start, slices = 0, []
        sizes = _sizes_of_parts(split.__name__, x.shape[axis], [part.shape[axis] for part in found], args, kwargs)
        for size in sizes:
            end = start + size
            slices.append(x[(slice(None),) * (axis % x.dim()) + (slice(start, end),)])
            start = end
        return type(found)(slices)

    return parts


_AXES = {"vsplit": 0, "hsplit": 1, "dsplit": 2}
"""The axis of those that are named after it; of a tensor of one axis, hsplit cuts that."""
_SPLIT_BY = ("split_size_or_sections", "split_size", "chunks", "indices_or_sections")


def _sizes_of_parts(name: str, whole: Any, sizes: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The sizes of the parts of an axis that varies, by formulas that hold for each of its sizes.

    Raises:
        BatchDoesNotVary: There are none, since the number of parts depends on the size.
    """
    given = args[0] if args else next((kwargs[key] for key in _SPLIT_BY if key in kwargs), None)
    if not isinstance(given, (int, torch.SymInt)) or name in _AXES:  # sizes, places, or parts of one size
        return sizes
    if name == "tensor_split":
        return [(whole + len(sizes) - 1 - number) // len(sizes) for number in range(len(sizes))]
    if given != len(sizes) if name == "chunk" else not isinstance(given, torch.SymInt):
        raise BatchDoesNotVary(
            f"how many parts {name}({given}) makes depends on the size of the batch, and a file has {len(sizes)}. Split "
            "it into a fixed number of parts, as tensor_split(2) does, or export with example_args of the size that will come"
        )
    return sizes


def sorted_maximum(x: Tensor, dim: int | Sequence[int] = (), keepdim: bool = False) -> Tensor:
    """`torch.amax` by a TopK of the axes, laid out as one.

    >>> x = torch.arange(24.0).reshape(2, 3, 4)
    >>> torch.equal(sorted_maximum(x, (0, -1), keepdim=True), x.amax((0, -1), keepdim=True)), float(sorted_maximum(x))
    (True, 23.0)
    """
    given = (dim,) if isinstance(dim, int) else tuple(dim)
    axes = sorted({axis % max(1, x.dim()) for axis in given}) or list(range(x.dim()))
    others = [axis for axis in range(x.dim()) if axis not in axes]
    largest = x.permute(*others, *axes).flatten(len(others)).topk(1, dim=-1).values.squeeze(-1)
    if keepdim:
        for axis in axes:
            largest = largest.unsqueeze(axis)
    return largest


def averages_images(kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a pooling or a mean takes the average of each whole channel of a batch of images, which has an operator of its own."""
    if not args or not isinstance(args[0], Tensor) or args[0].dim() != 4:
        return False
    if kind == "adaptive_avg_pool":
        size = args[1] if len(args) > 1 else kwargs.get("output_size")
        return size in (1, (1, 1), [1, 1])
    axes = args[1] if len(args) > 1 else kwargs.get("dim")
    return kind == "mean" and isinstance(axes, (tuple, list)) and sorted(axis % 4 for axis in axes) == [2, 3]


@dataclass(frozen=True)
class BlockedConvolution:
    """A convolution of stride 2 as one of stride 1 on blocks of 2 × 2 pixels, whose channels it reads as one pixel's.

    An image's 3 channels are too few for an engine's INT8 kernels, which read 4 at a time; the 12 of a block are not. No product is added or
    left out but those with zeros.

    Attributes:
        weight: (out, 4 · in, blocks, blocks), of the old weight's type.
        pads: Zeros around the image of blocks: top, left, bottom, right.
    """

    weight: Tensor
    pads: tuple[int, int, int, int]


def blocked_convolution(weight: Tensor, image: tuple[Any, Any], call: dict[str, Any], channel_multiple: int) -> BlockedConvolution | None:
    """Write a convolution on blocks, if that helps and can be done.

    Args:
        weight: (out, in, height, width).
        image: Height and width of what it reads; only fixed, even sizes can be blocked.
        call: ``stride``, ``padding``, ``dilation`` and ``groups`` of the convolution, pairs or one number.
        channel_multiple: How many channels the engine reads at a time.
    """
    pair = {name: (value, value) if isinstance(value, int) else tuple(value) for name, value in call.items() if name != "groups"}
    if weight.dim() != 4 or weight.shape[1] % channel_multiple == 0 or (4 * weight.shape[1]) % channel_multiple or call["groups"] != 1:
        return None
    if isinstance(call["padding"], str) or pair["stride"] != (2, 2) or pair["dilation"] != (1, 1):
        return None
    if any(not isinstance(size, int) or size % 2 for size in image):
        return None
    out, channels = weight.shape[:2]
    first, counts, after = [], [], []
    for size, kernel, padding in zip(image, weight.shape[2:], pair["padding"], strict=True):
        low, high = -padding // 2, (kernel - 1 - padding) // 2
        result = (size + 2 * padding - kernel) // 2 + 1
        first.append(low)
        counts.append(high - low + 1)
        after.append(result - 1 - size // 2 + low + counts[-1])
    if min(after) < 0:
        return None
    blocked = weight.new_zeros(out, 2, 2, channels, *counts)
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            y, x = i - pair["padding"][0] - 2 * first[0], j - pair["padding"][1] - 2 * first[1]
            blocked[:, y % 2, x % 2, :, y // 2, x // 2] = weight[:, :, i, j]
    return BlockedConvolution(blocked.reshape(out, 4 * channels, *counts), (-first[0], -first[1], after[0], after[1]))


_LONGEST, _NORM = 3, 4
"""Positions of an embedding's ``max_norm`` and ``norm_type``."""


def bound_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float] | None:
    """``max_norm`` and ``norm_type`` of a call of `torch.nn.functional.embedding` or ``embedding_bag``; `None` without them."""
    longest = args[_LONGEST] if len(args) > _LONGEST else kwargs.get("max_norm")
    if longest is None:
        return None
    return float(longest), float(args[_NORM] if len(args) > _NORM else kwargs.get("norm_type", 2.0))


def shortened(table: Tensor, longest: float, norm: float) -> Tensor:
    """A copy of an embedding's table, (rows, columns), with all rows as a lookup would shorten them in place."""
    rows = table.detach().clone()
    return torch.embedding_renorm_(rows, torch.arange(len(rows), device=rows.device), longest, norm)


def without_bound(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an embedding's call without ``max_norm``."""
    if len(args) > _LONGEST:
        args = (*args[:_LONGEST], None, *args[_LONGEST + 1 :])
    return args, {**kwargs, "max_norm": None} if "max_norm" in kwargs else kwargs
