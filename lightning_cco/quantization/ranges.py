"""Range estimators: from the values of a batch to the interval that a quantizer covers."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cco.quantization.qparams import affine_qparams, quant_range

_MOST_SAMPLES = 65_536
_CLIP_RATIOS = 40


FEW_BITS = 4
"""Up to here what is rounded finely is worth more than the extremes: estimators that are ``auto`` clip (`benchmarks/fashion.py`)."""


def range_estimator(setting: str, num_bits: int) -> str:
    """The estimator of a tensor's range that a setting means at its bits.

    >>> range_estimator("auto", 8), range_estimator("auto", 4), range_estimator("min_max", 4)
    ('moving_average', 'mse', 'min_max')
    """
    if setting == "learned":  # which begins there
        return "mse"
    return setting if setting != "auto" else "mse" if num_bits <= FEW_BITS else "moving_average"


def weight_estimator(setting: str, num_bits: int) -> str:
    """The estimator of a weight's scales that a setting means at its bits.

    >>> weight_estimator("auto", 8), weight_estimator("auto", 4), weight_estimator("minmax", 4)
    ('minmax', 'mse', 'minmax')
    """
    if setting == "learned":
        return "mse"
    return setting if setting != "auto" else "mse" if num_bits <= FEW_BITS else "minmax"


def batch_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value, as 0-d float32."""
    x = x.detach()
    if x.numel() == 0:
        zero = torch.zeros((), dtype=torch.float32, device=x.device)
        return zero, zero
    low, high = torch.aminmax(x)
    return low.float(), high.float()


def sample(x: Tensor) -> Tensor:
    """At most 65,536 of the values, evenly strided, as 1-d float32."""
    flat = x.detach().reshape(-1)
    stride = max(1, -(-flat.numel() // _MOST_SAMPLES))
    return flat[::stride].float()


def percentile_range(x: Tensor, percentile: float, clamp: tuple[float, float] | None = None) -> tuple[Tensor, Tensor]:
    """The interval that leaves out ``100 - percentile`` per cent of the values at each end (linear interpolation, as in NumPy)."""
    values = sample(x)
    if values.numel() == 0:
        return batch_range(x)
    if clamp is not None:
        values = values.clamp(*clamp)
    # Made on the device: sending it there would wait for it.
    ends = torch.linspace(1.0 - percentile / 100.0, percentile / 100.0, 2, device=values.device, dtype=values.dtype)
    low, high = torch.quantile(values, ends)
    # Where hardly any value is not 0, the interval without the rarest values would be that of 0 alone.
    lowest, highest = torch.aminmax(values)
    nothing = (low == 0) & (high == 0)
    return torch.where(nothing, lowest, low), torch.where(nothing, highest, high)


def says_something(low: Tensor, high: Tensor) -> Tensor:
    """Which ranges of batches tell something: those of finite values that are not all 0. An empty tensor has the range [inf, -inf], or [0, 0]."""
    return torch.isfinite(low) & torch.isfinite(high) & ((low != 0) | (high != 0))


def clip_errors(values: Tensor, min_val: Tensor, max_val: Tensor, num_bits: int, symmetric: bool) -> Tensor:
    """The sum of squared errors of rounding and clipping together at each factor of a range: float64, one for each of `clip_ratios`.

    Tries 40 factors from 0.025 to 1 (Sung et al., "Resiliency of Deep Neural Networks under Quantization", 2015).

    Args:
        values: 1-d sample of the tensor.
        min_val: Smallest value, 0-d.
        max_val: Largest value, 0-d.
        num_bits: Bits of the format.
        symmetric: Whether the zero point must be 0.

    """
    quant_min, quant_max = quant_range(num_bits, symmetric)
    errors = []
    for ratio in clip_ratios(values.device):
        scale, zero_point = affine_qparams(min_val * ratio, max_val * ratio, num_bits, symmetric)
        levels = (values / scale + zero_point).round().clamp(quant_min, quant_max)
        errors.append(((levels - zero_point) * scale - values).double().square().sum())
    return torch.stack(errors)


def clip_ratios(device: torch.device) -> Tensor:
    """The factors that are tried, float32."""
    return torch.arange(1, _CLIP_RATIOS + 1, device=device, dtype=torch.float32) / _CLIP_RATIOS


def best_clip_ratio(errors: Tensor) -> Tensor:
    """The factor of a range at which rounding and clipping together lose least, 0-d float32 in (0, 1], from what `clip_errors` gives."""
    return clip_ratios(errors.device)[errors.argmin()]
