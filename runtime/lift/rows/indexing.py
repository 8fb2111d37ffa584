# SPDX-License-Identifier: Apache-2.0
"""Operators that pick elements by index, by order or by condition: Gather, TopK, ArgMax, Compress..."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from splitfold.runtime.lift import host
from splitfold.runtime.lift.carried import integers
from splitfold.runtime.lift.row import Row, Rows, since

__all__ = ["ROWS", "gather", "wrap"]


def wrap(indices: Tensor, length: int) -> Tensor:
    """Return indices that count from the end, the negative ones, as indices from the start."""
    return torch.where(indices < 0, indices + length, indices)


def gather(x: Tensor, indices: Tensor | int, *, axis: int = 0) -> Tensor:
    """Gather slices along one axis."""
    if isinstance(indices, int):
        return x.select(axis, indices)
    places, at = wrap(indices, x.shape[axis]), axis % x.ndim
    if at == 0 and x.ndim == 2 and x.dtype.is_floating_point and indices.dtype is torch.int64:
        return F.embedding(places, x)
    found = x.index_select(at, places.reshape(-1))
    return found.reshape(*x.shape[:at], *indices.shape, *x.shape[at + 1 :])


def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """GatherElements."""
    return x.gather(axis, wrap(indices, x.shape[axis]).long())


def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """GatherND: the last axis of `indices` holds a place each, behind the axes of the batch."""
    rank = indices.ndim - 1
    batches = [
        torch.arange(x.shape[axis], device=x.device).reshape([-1 if i == axis else 1 for i in range(rank)])
        for axis in range(batch_dims)
    ]
    return x[(*batches, *indices.long().unbind(-1))]


def top_k(x: Tensor, k: Any, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    """TopK, opset 10: (values, indices); of equal elements the first comes first."""
    values, places = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    count = integers(k)[0]
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)


def top_k_by_attribute(x: Tensor, *, k: int, axis: int = -1) -> tuple[Tensor, Tensor]:
    """TopK, opset 1."""
    return top_k(x, k, axis=axis)


def arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """ArgMax: of equal elements the first, or the last."""
    if not select_last_index:
        return x.argmax(axis, keepdim=bool(keepdims))
    return x.shape[axis] - 1 - x.flip(axis).argmax(axis, keepdim=bool(keepdims))


def arg_min(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """ArgMin: of equal elements the first, or the last."""
    if not select_last_index:
        return x.argmin(axis, keepdim=bool(keepdims))
    return x.shape[axis] - 1 - x.flip(axis).argmin(axis, keepdim=bool(keepdims))


def non_zero(x: Tensor) -> Tensor:
    """NonZero: a row of indices an axis."""
    return x.nonzero().T


def compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    """Compress: slices, or elements of the flattened tensor, where the condition holds."""
    flat, at = (x.reshape(-1), 0) if axis is None else (x, axis)
    return flat.index_select(at, condition.nonzero().reshape(-1))


def reverse_sequence(x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """ReverseSequence: the first `lengths` steps of each sample the other way round."""
    times = torch.arange(x.shape[time_axis], device=x.device)
    ends = lengths.long().unsqueeze(1)
    places = torch.where(times < ends, ends - 1 - times, times)  # [batch, time]
    places = places if batch_axis < time_axis else places.T
    shape = [x.shape[axis] if axis in (batch_axis, time_axis) else 1 for axis in range(x.ndim)]
    return x.gather(time_axis, places.reshape(shape).expand(x.shape))


ROWS: Rows = {
    "ArgMax": Row(arg_max),
    "ArgMin": Row(arg_min),
    "Compress": Row(compress),
    "Gather": Row(gather, scalars=(1,), on_host=host.gather, passes_codes=True),
    "GatherElements": Row(gather_elements),
    "GatherND": Row(gather_nd),
    "NonZero": Row(non_zero),
    "ReverseSequence": Row(reverse_sequence),
    "TopK": since(10, Row(top_k, host=(1,), many=True), Row(top_k_by_attribute, many=True)),
}
