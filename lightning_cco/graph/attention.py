"""`torch.nn.functional.multi_head_attention_forward` written with functions that a function mode can see.

PyTorch's own runs its matmuls inside one opaque call. Same arguments, same results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_cco.errors import CCOError


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Multi-head attention.

    Args and returns are those of `torch.nn.functional.multi_head_attention_forward`: query of shape (L, N, E) or (L, E), key and value of shape
    (S, N, E) or (S, E); returns the output of the query's shape and, if ``need_weights``, the attention weights of shape (N, L, S), averaged
    over heads, or (N, heads, L, S).
    """
    if static_k is not None or static_v is not None:
        raise CCOError("multi_head_attention_forward: static_k and static_v are not supported; pass key and value instead.")
    batched = query.dim() == 3
    same_key, same_value = key is query, value is key
    if not batched:
        query = query.unsqueeze(1)
        key = query if same_key else key.unsqueeze(1)
        value = key if same_value else value.unsqueeze(1)
        key_padding_mask = key_padding_mask.unsqueeze(0) if key_padding_mask is not None else None
    length, batch, width = query.shape
    head_width = width // num_heads

    separate = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None
    q, k, v = _projected((query, key, value), separate, in_proj_weight, in_proj_bias, same_key and same_value)

    extra = 0
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.expand(1, batch, width)])
        v = torch.cat([v, bias_v.expand(1, batch, width)])
        extra += 1
    # (length, batch, width) -> (batch, heads, length, head width)
    q, k, v = (x.reshape(x.shape[0], batch, num_heads, head_width).permute(1, 2, 0, 3) for x in (q, k, v))
    if add_zero_attn:
        zeros = k.new_zeros(batch, num_heads, 1, head_width)
        k, v = torch.cat([k, zeros], dim=2), torch.cat([v, zeros], dim=2)
        extra += 1

    mask = _merged_mask(attn_mask, key_padding_mask, extra, batch, num_heads, q)
    dropout_p = dropout_p if training else 0.0
    if need_weights:
        attended, weights_out = _weighted(q, k, v, mask, dropout_p)
    else:
        causal = is_causal and key_padding_mask is None and extra == 0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=None if causal else mask, dropout_p=dropout_p, is_causal=causal)
        weights_out = None
    attended = attended.permute(2, 0, 1, 3).reshape(length, batch, width)
    output = F.linear(attended, out_proj_weight, out_proj_bias)
    if weights_out is not None and average_attn_weights:
        weights_out = weights_out.mean(dim=1)
    if not batched:
        output = output.squeeze(1)
        weights_out = weights_out.squeeze(0) if weights_out is not None else None
    return output, weights_out


def _projected(
    inputs: tuple[Tensor, Tensor, Tensor],
    separate: tuple[Tensor | None, Tensor | None, Tensor | None] | None,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    same: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value through their linear layers: as one product where all three are the same tensor and have one weight."""
    if separate is None:
        assert in_proj_weight is not None
        if same:
            q, k, v = F.linear(inputs[0], in_proj_weight, in_proj_bias).chunk(3, dim=-1)
            return q, k, v
        weights: Sequence[Tensor | None] = in_proj_weight.chunk(3)
    else:
        weights = separate
    biases = in_proj_bias.chunk(3) if in_proj_bias is not None else (None, None, None)
    found = []
    for x, weight, bias in zip(inputs, weights, biases, strict=True):
        assert weight is not None
        found.append(F.linear(x, weight, bias))
    return found[0], found[1], found[2]


def _weighted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor]:
    """The attended values, and the attention weights that `F.scaled_dot_product_attention` doesn't return."""
    scores = q @ k.transpose(-2, -1) * (1.0 / math.sqrt(q.shape[-1]))
    if mask is not None:
        scores = scores + mask
    weights = F.softmax(scores, dim=-1)
    if dropout_p > 0.0:
        weights = F.dropout(weights, dropout_p)
    return weights @ v, weights


def _merged_mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, extra: int, batch: int, num_heads: int, like: Tensor
) -> Tensor | None:
    """One float mask of a shape that broadcasts to (batch, heads, L, S), from the two that the caller may give (True or -inf: not attended)."""

    def as_float(mask: Tensor) -> Tensor:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
        return F.pad(mask, (0, extra)) if extra else mask

    merged: Tensor | None = None
    if attn_mask is not None:
        merged = as_float(attn_mask)
        merged = merged.reshape(batch, num_heads, *merged.shape[1:]) if merged.dim() == 3 else merged[None, None]
    if key_padding_mask is not None:
        padding = as_float(key_padding_mask)[:, None, None, :]
        merged = padding if merged is None else merged + padding
    return merged
