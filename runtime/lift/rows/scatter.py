# SPDX-License-Identifier: Apache-2.0
"""Operators that write elements into a copy of a tensor: ScatterElements, ScatterND, TensorScatter."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from splitfold.runtime.lift.row import Row, Rows
from splitfold.runtime.lift.rows.indexing import wrap

__all__ = ["ROWS"]

_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def scatter_elements(
    x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    """ScatterElements."""
    places = wrap(indices, x.shape[axis]).long()
    if reduction == "none":
        return x.scatter(axis, places, updates)
    return x.scatter_reduce(axis, places, updates, _REDUCTIONS[reduction], include_self=True)


def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    """ScatterND: slices at the places that the last axis of `indices` holds."""
    depth = indices.shape[-1]
    sizes, rest = x.shape[:depth], math.prod(x.shape[depth:])
    flat = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=x.device)
    for axis, size in enumerate(sizes):
        flat = flat * size + wrap(indices[..., axis].long(), size)
    rows = flat.reshape(-1)
    table, slices = x.reshape(math.prod(sizes), rest), updates.reshape(len(rows), rest)
    spread = rows.unsqueeze(1).expand(-1, rest)
    if reduction == "none":
        return table.scatter(0, spread, slices).reshape(x.shape)
    return table.scatter_reduce(0, spread, slices, _REDUCTIONS[reduction], include_self=True).reshape(x.shape)


def tensor_scatter(
    past: Tensor, update: Tensor, starts: Tensor | None = None, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    """TensorScatter: each sample's update from its own start on along `axis`, with ``circular`` around."""
    at, count = axis % past.ndim, update.shape[axis]
    first = torch.zeros(len(past), dtype=torch.int64, device=past.device) if starts is None else starts.long()
    places = first.unsqueeze(1) + torch.arange(count, device=past.device)  # [batch, update]
    places = places % past.shape[at] if mode == "circular" else places
    shape = [len(past) if i == 0 else count if i == at else 1 for i in range(past.ndim)]
    return past.scatter(at, places.reshape(shape).expand(update.shape), update)


ROWS: Rows = {
    "Scatter": Row(scatter_elements),
    "ScatterElements": Row(scatter_elements),
    "ScatterND": Row(scatter_nd),
    "TensorScatter": Row(tensor_scatter),
}
