# SPDX-License-Identifier: Apache-2.0
"""Reductions over axes, which are an attribute first and an input from opset 13 (ReduceSum) or 18 on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from splitfold.runtime.lift import host
from splitfold.runtime.lift.carried import integers
from splitfold.runtime.lift.row import Row, Rows

__all__ = ["ROWS"]

_Axes = tuple[int, ...]
_Reduction = Callable[[Tensor, _Axes, bool], Tensor]


def _sum(x: Tensor, axes: _Axes, keep: bool) -> Tensor:
    return x.sum(axes, keep, dtype=x.dtype)


def _mean(x: Tensor, axes: _Axes, keep: bool) -> Tensor:
    if x.dtype.is_floating_point:
        return x.mean(axes, keep)
    return torch.div(x.sum(axes, keep), _count(x, axes), rounding_mode="trunc").to(x.dtype)


def _largest(x: Tensor, axes: _Axes, keep: bool) -> Tensor:
    return x.amax(axes, keep) if _count(x, axes) else _filled(x, axes, keep, _ends(x.dtype)[0])


def _smallest(x: Tensor, axes: _Axes, keep: bool) -> Tensor:
    return x.amin(axes, keep) if _count(x, axes) else _filled(x, axes, keep, _ends(x.dtype)[1])


def _product(x: Tensor, axes: _Axes, keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keep, dtype=x.dtype)
    return x


def _norm1(x: Tensor, axes: _Axes, keep: bool) -> Tensor:
    return _sum(x.abs(), axes, keep)


def _norm2(x: Tensor, axes: _Axes, keep: bool) -> Tensor:
    if x.dtype.is_floating_point:
        norm: Tensor = torch.linalg.vector_norm(x, 2, axes, keep)
        return norm
    return _sum(x * x, axes, keep).double().sqrt().to(x.dtype)


def _log_sum(x: Tensor, axes: _Axes, keep: bool) -> Tensor:
    return torch.log(_sum(x, axes, keep))


def _log_sum_exp(x: Tensor, axes: _Axes, keep: bool) -> Tensor:
    return torch.logsumexp(x, axes, keep)


def _sum_of_squares(x: Tensor, axes: _Axes, keep: bool) -> Tensor:
    return _sum(x * x, axes, keep)


def _count(x: Tensor, axes: _Axes) -> int:
    return int(np.prod([x.shape[axis] for axis in axes], dtype=np.int64))


def _ends(dtype: torch.dtype) -> tuple[float, float]:
    if dtype.is_floating_point:
        return -float("inf"), float("inf")
    return (0, 1) if dtype is torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)


def _filled(x: Tensor, axes: _Axes, keep: bool, value: float) -> Tensor:
    """Return the reduction of a tensor without elements along `axes`."""
    at = {axis % x.ndim for axis in axes}
    shape = [1 if axis in at else size for axis, size in enumerate(x.shape) if keep or axis not in at]
    return torch.full(shape, value, dtype=x.dtype, device=x.device)


def _reduced(
    function: _Reduction, x: Tensor, given: Any, axes: _Axes | None, keepdims: int, noop: int
) -> Tensor:
    chosen = tuple(integers(given)) if given is not None else axes or ()
    if not chosen and noop:
        return function(x.unsqueeze(-1), (-1,), False)  # each element is reduced by itself
    if not x.ndim:
        return function(x.unsqueeze(0), (0,), False)
    return function(x, chosen or tuple(range(x.ndim)), bool(keepdims))


def reduce_l1(
    x: Tensor,
    given: Any = None,
    *,
    axes: _Axes | None = None,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Tensor:
    """ReduceL1: the sum of absolute values."""
    return _reduced(_norm1, x, given, axes, keepdims, noop_with_empty_axes)


def reduce_l2(
    x: Tensor,
    given: Any = None,
    *,
    axes: _Axes | None = None,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Tensor:
    """ReduceL2: the root of the sum of squares."""
    return _reduced(_norm2, x, given, axes, keepdims, noop_with_empty_axes)


def reduce_log_sum(
    x: Tensor,
    given: Any = None,
    *,
    axes: _Axes | None = None,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Tensor:
    """ReduceLogSum: the logarithm of the sum."""
    return _reduced(_log_sum, x, given, axes, keepdims, noop_with_empty_axes)


def reduce_log_sum_exp(
    x: Tensor,
    given: Any = None,
    *,
    axes: _Axes | None = None,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Tensor:
    """ReduceLogSumExp: the logarithm of the sum of exponentials."""
    return _reduced(_log_sum_exp, x, given, axes, keepdims, noop_with_empty_axes)


def reduce_max(
    x: Tensor,
    given: Any = None,
    *,
    axes: _Axes | None = None,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Tensor:
    """ReduceMax: the largest."""
    return _reduced(_largest, x, given, axes, keepdims, noop_with_empty_axes)


def reduce_mean(
    x: Tensor,
    given: Any = None,
    *,
    axes: _Axes | None = None,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Tensor:
    """ReduceMean: the mean."""
    return _reduced(_mean, x, given, axes, keepdims, noop_with_empty_axes)


def reduce_min(
    x: Tensor,
    given: Any = None,
    *,
    axes: _Axes | None = None,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Tensor:
    """ReduceMin: the smallest."""
    return _reduced(_smallest, x, given, axes, keepdims, noop_with_empty_axes)


def reduce_prod(
    x: Tensor,
    given: Any = None,
    *,
    axes: _Axes | None = None,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Tensor:
    """ReduceProd: the product."""
    return _reduced(_product, x, given, axes, keepdims, noop_with_empty_axes)


def reduce_sum(
    x: Tensor,
    given: Any = None,
    *,
    axes: _Axes | None = None,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Tensor:
    """ReduceSum: the sum."""
    return _reduced(_sum, x, given, axes, keepdims, noop_with_empty_axes)


def reduce_sum_square(
    x: Tensor,
    given: Any = None,
    *,
    axes: _Axes | None = None,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Tensor:
    """ReduceSumSquare: the sum of squares."""
    return _reduced(_sum_of_squares, x, given, axes, keepdims, noop_with_empty_axes)


ROWS: Rows = {
    "ReduceL1": Row(reduce_l1, host=(1,)),
    "ReduceL2": Row(reduce_l2, host=(1,)),
    "ReduceLogSum": Row(reduce_log_sum, host=(1,)),
    "ReduceLogSumExp": Row(reduce_log_sum_exp, host=(1,)),
    "ReduceMax": Row(reduce_max, host=(1,), on_host=host.reduce_by(np.max)),
    "ReduceMean": Row(reduce_mean, host=(1,)),
    "ReduceMin": Row(reduce_min, host=(1,), on_host=host.reduce_by(np.min)),
    "ReduceProd": Row(reduce_prod, host=(1,), on_host=host.reduce_by(np.prod)),
    "ReduceSum": Row(reduce_sum, host=(1,), on_host=host.reduce_by(np.sum)),
    "ReduceSumSquare": Row(reduce_sum_square, host=(1,)),
}
