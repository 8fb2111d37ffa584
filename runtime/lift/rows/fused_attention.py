# SPDX-License-Identifier: Apache-2.0
"""com.microsoft operators of attention: Attention, MultiHeadAttention, RotaryEmbedding."""

from __future__ import annotations

import math

import onnx_ir as ir
import torch
from torch import Tensor

from splitfold.runtime.errors import UnsupportedError
from splitfold.runtime.lift.row import Attributes, Row, Rows
from splitfold.runtime.lift.rows.attention import joined, rotated, split_heads

__all__ = ["ROWS"]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    causal: bool,
    filter_value: float,
) -> Tensor:
    """Return the output [batch, time, heads * size] from heads; `mask` is what is added besides `bias`."""
    scores = (q @ k.transpose(-1, -2)) * (scale or 1 / math.sqrt(q.shape[-1]))
    if causal:
        ahead = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        later = ahead.triu(k.shape[2] - q.shape[2] + 1)
        scores = scores.masked_fill(later, filter_value)
    for added in (mask, bias):
        scores = scores if added is None else scores + added
    return joined(torch.softmax(scores, -1) @ v)


def _key_mask(mask: Tensor | None, keys: int, filter_value: float, dtype: torch.dtype) -> Tensor | None:
    """Return a mask of keys, or the number of keys of each sample, as what is added to the scores."""
    if mask is None:
        return None
    if mask.ndim == 1:
        mask = torch.arange(keys, device=mask.device) < mask.unsqueeze(1)
    if mask.ndim > 3:
        raise UnsupportedError("attention masks of rank 4 are not handled.")
    seen = mask.bool().unsqueeze(1)
    seen = seen.unsqueeze(1) if seen.ndim == 3 else seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, filter_value)


def attention(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    past: Tensor | None = None,
    added: Tensor | None = None,
    *,
    mask_filter_value: float = -10000.0,
    num_heads: int,
    qkv_hidden_sizes: tuple[int, ...] | None = None,
    scale: float = 0.0,
    unidirectional: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention with its input projection: (output, keys and values)."""
    product = x @ weight if bias is None else x @ weight + bias
    sizes = list(qkv_hidden_sizes or [weight.shape[1] // 3] * 3)
    q, k, v = (split_heads(part, num_heads) for part in torch.split(product, sizes, -1))
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    masked = _key_mask(mask, k.shape[2], mask_filter_value, x.dtype)
    found = _attend(q, k, v, masked, added, scale, bool(unidirectional), mask_filter_value)
    return found, torch.stack([k, v]) if k.shape == v.shape else k


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    added: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    *,
    mask_filter_value: float = -10000.0,
    num_heads: int,
    scale: float = 0.0,
    unidirectional: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """MultiHeadAttention of separate queries, keys and values: (output, all keys, all values)."""
    if bias is not None:
        sizes = [query.shape[-1], query.shape[-1], len(bias) - 2 * query.shape[-1]]
        b_q, b_k, b_v = torch.split(bias, sizes)
        query, key, value = query + b_q, key + b_k, value + b_v
    q = split_heads(query, num_heads)
    k, v = (item if item.ndim == 4 else split_heads(item, num_heads) for item in (key, value))
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    masked = _key_mask(mask, k.shape[2], mask_filter_value, q.dtype)
    return _attend(q, k, v, masked, added, scale, bool(unidirectional), mask_filter_value), k, v


def refuse_packed(node: ir.Node, _: Attributes) -> str | None:
    """Return why a MultiHeadAttention is not handled, or None."""
    present = [value is not None for value in node.inputs]
    if not all(present[1:3]) or len(present) < 3:
        return "queries, keys and values in one packed input are not handled"
    return "its inputs behind the past values are not handled" if any(present[8:]) else None


def rotary_embedding(
    x: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: int = 0,
    is_packed_batching: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """RotaryEmbedding: positions are those of all tokens, or that of the first one."""
    size = rotary_embedding_dim or 2 * cos.shape[-1]
    heads = x if x.ndim == 4 else split_heads(x, num_heads or x.shape[-1] // size)
    at = positions.long()
    if at.numel() == 1 and at.ndim == 1:
        at = (at + torch.arange(heads.shape[2], device=x.device)).unsqueeze(0)
    found = rotated(heads, cos[at].unsqueeze(1), sin[at].unsqueeze(1), size, bool(interleaved))
    return found if x.ndim == 4 else joined(found)


def refuse_rotary(_: ir.Node, attributes: Attributes) -> str | None:
    """Return why a RotaryEmbedding is not handled, or None."""
    if attributes.get("scale", 1.0) != 1.0 or attributes.get("is_packed_batching", 0):
        return "a scale, and packed batches, are not handled"
    return None


ROWS: Rows = {
    "Attention": Row(attention, many=True),
    "MultiHeadAttention": Row(multi_head_attention, many=True, refuses=refuse_packed),
    "RotaryEmbedding": Row(rotary_embedding, fixed=(2, 3), refuses=refuse_rotary),
}
