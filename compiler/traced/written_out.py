# SPDX-License-Identifier: Apache-2.0
"""Attention that torch computes in one function, written as its products and its softmax."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["WrittenOut", "guarded_softmax", "guarded_softmaxes"]


class WrittenOut(TorchFunctionMode):
    """Within it `scaled_dot_product_attention` calls the operators that torch.onnx writes for it."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call `func`, or what stands in its place."""
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """[..., heads, queries, size], [..., heads, keys, size] twice -> [..., heads, queries, size]."""
    factor = math.sqrt(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if enable_gqa:
        key, value = (part.repeat_interleave(query.shape[-3] // part.shape[-3], -3) for part in (key, value))
    scores = (query * factor) @ (key.transpose(-1, -2) * factor)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores + _bias(scores, attn_mask)
    shares = scores.softmax(-1)
    if attn_mask is not None and not is_causal:  # rows that see no key are zeros
        shares = torch.where(
            shares.isnan(), torch.zeros((), dtype=shares.dtype, device=shares.device), shares
        )
    if dropout_p > 0:
        shares = functional.dropout(shares, dropout_p, training=True)
    return shares @ value


def _bias(scores: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask
    ends = (torch.full((), end, dtype=scores.dtype, device=scores.device) for end in (0.0, -math.inf))
    return torch.where(mask, next(ends), next(ends))


class _Guarded(torch.autograd.Function):
    """A softmax whose rows of -inf are zeros, and so are their gradients, which would be NaN."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, dim: int) -> Tensor:
        found = logits.softmax(dim)
        found = torch.where(found.isnan(), torch.zeros((), dtype=found.dtype, device=found.device), found)
        ctx.save_for_backward(found)
        ctx.dim = dim
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (found,) = ctx.saved_tensors
        product = found * gradients[0]
        return product - found * product.sum(ctx.dim, keepdim=True), None


def guarded_softmax(logits: Tensor, dim: int) -> Tensor:
    """Return the softmax, and zeros in the place of NaN, of rows that are -inf; these take no gradient."""
    found: Tensor = _Guarded.apply(logits, dim)  # type: ignore[no-untyped-call]
    return found


def guarded_softmaxes(graph: torch.fx.Graph) -> None:
    """Let each softmax behind which NaN becomes 0 take no gradient there."""
    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not aten.where.self:
            continue
        condition, _, softmax = node.args
        is_guard = getattr(condition, "target", None) is aten.isnan.default and condition.args[0] is softmax
        if is_guard and softmax.target is aten.softmax.int and set(softmax.users) == {condition, node}:
            with graph.inserting_before(node):
                made = graph.call_function(guarded_softmax, softmax.args[:2])
            made.meta = dict(node.meta)
            node.replace_all_uses_with(made)
            for old in (node, condition, softmax):
                graph.erase_node(old)
