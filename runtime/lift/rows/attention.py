# SPDX-License-Identifier: Apache-2.0
"""Attention and rotary embedding, as the ONNX operators of opset 23 to 25 have them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from splitfold.runtime.lift.dtypes import torch_dtype
from splitfold.runtime.lift.row import Extra, Row, Rows

__all__ = ["ROWS", "joined", "rotated", "split_heads"]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return [batch, heads, time, size] of [batch, time, heads * size]."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """Return [batch, time, heads * size] of [batch, heads, time, size]."""
    return x.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class _Window:
    """Which keys a query may see, by its place: both ends of the window, None being open."""

    left: int | None
    right: int | None

    def bias(self, queries: int, keys: int, offset: Tensor, dtype: torch.dtype) -> Tensor:
        """Return 0 and -inf as [1 or batch, 1, queries, keys]; `offset` is the place of the first query."""
        places = torch.arange(queries, device=offset.device).reshape(-1, 1) + offset.reshape(-1, 1, 1, 1)
        ahead = torch.arange(keys, device=offset.device) - places
        seen = torch.ones_like(ahead, dtype=torch.bool)
        if self.left is not None:
            seen = seen & (ahead >= -self.left)
        if self.right is not None:
            seen = seen & (ahead <= self.right)
        return _bias(seen, dtype)


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -math.inf)


def _mask(mask: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
    """Return a mask as what is added to the scores, filled up to all keys."""
    added = _bias(mask, dtype) if mask.dtype is torch.bool else mask
    return F.pad(added, (0, keys - added.shape[-1]), value=-math.inf) if added.shape[-1] < keys else added


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    outputs: int,
) -> tuple[Tensor, ...]:
    """Attention: (output, all keys, all values, scores); a query that may see no key gives zeros."""
    flat = q.ndim == 3
    if flat:
        q, k, v = (
            split_heads(item, heads or 1)
            for item, heads in ((q, q_num_heads), (k, kv_num_heads), (v, kv_num_heads))
        )
    before = 0 if past_key is None else past_key.shape[2]
    k = k if past_key is None else torch.cat([past_key, k], 2)
    v = v if past_value is None else torch.cat([past_value, v], 2)
    added: list[Tensor] = [] if mask is None else [_mask(mask, k.shape[2], q.dtype)]
    offset = torch.tensor([before], device=q.device) if lengths is None else lengths.long() - q.shape[2]
    right = 0 if is_causal else right_window_size if right_window_size >= 0 else None
    window = _Window(left_window_size if left_window_size >= 0 else None, right)
    if window != _Window(None, None):
        added.append(window.bias(q.shape[2], k.shape[2], offset, q.dtype))
    if lengths is not None:
        keys = torch.arange(k.shape[2], device=q.device)
        added.append(_bias(keys < lengths.reshape(-1, 1, 1, 1), q.dtype))
    precision = q.dtype if softmax_precision is None else torch_dtype(softmax_precision)
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    stages = _scores(q, k, added, factor, softcap, precision)
    groups = q.shape[1] // v.shape[1]
    found = stages[3] @ (v if groups == 1 else v.repeat_interleave(groups, 1))
    return (joined(found) if flat else found, k, v, stages[qk_matmul_output_mode])[: max(outputs, 1)]


def _scores(
    q: Tensor, k: Tensor, added: list[Tensor], scale: float, softcap: float, precision: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the scores raw, capped, masked, and as probabilities."""
    groups = q.shape[1] // k.shape[1]
    keys = k if groups == 1 else k.repeat_interleave(groups, 1)
    root = math.sqrt(scale)
    raw = (q * root) @ (keys * root).transpose(-1, -2)
    capped = softcap * torch.tanh(raw / softcap) if softcap else raw
    masked = capped
    for bias in added:
        masked = masked + bias
    shares = torch.softmax(masked.to(precision), -1)
    if added:
        blind = (masked == -math.inf).all(-1, keepdim=True)
        shares = torch.where(blind, torch.zeros_like(shares), shares)
    return raw, capped, masked, shares.to(q.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, size: int, interleaved: bool) -> Tensor:
    """Return x with the first `size` elements of each head rotated (arXiv:2104.09864).

    x is [batch, heads, time, head size], cosines and sines are [batch, 1, time, size / 2].
    """
    turned, kept = x[..., :size], x[..., size:]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    real, imaginary = cos * first - sin * second, sin * first + cos * second
    if interleaved:
        whole = torch.stack([real, imaginary], -1).flatten(-2)
    else:
        whole = torch.cat([real, imaginary], -1)
    return torch.cat([whole, kept], -1) if kept.shape[-1] else whole


def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """RotaryEmbedding, opset 23."""
    heads = x if x.ndim == 4 else split_heads(x, num_heads)
    cos, sin = (item if positions is None else item[positions.long()] for item in (cos, sin))
    size = rotary_embedding_dim or heads.shape[-1]
    found = rotated(heads, cos.unsqueeze(1), sin.unsqueeze(1), size, bool(interleaved))
    return found if x.ndim == 4 else joined(found)


ROWS: Rows = {
    "Attention": Row(attention, many=True, extras=(Extra.OUTPUTS,)),
    "RotaryEmbedding": Row(rotary_embedding, fixed=(1, 2)),
}
