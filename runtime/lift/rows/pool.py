# SPDX-License-Identifier: Apache-2.0
"""Pooling, with ONNX's paddings, dilations and rounding of the output's size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from splitfold.runtime.lift.carried import integers
from splitfold.runtime.lift.row import Extra, Row, Rows
from splitfold.runtime.lift.rows.conv import Ints, same_pads
from splitfold.runtime.lift.rows.moving import pad_sides

__all__ = ["ROWS", "average_pool"]

_MAX: dict[int, Any] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_CONV: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

Sides = list[tuple[int, int]]


def _sides(
    sizes: Sequence[int],
    kernel: Ints,
    strides: Ints,
    dilations: Ints,
    pads: Ints | None,
    auto_pad: str,
    ceil: bool,
) -> tuple[Sides, Sides]:
    """Return (begin, end) of the padding of each axis: as stated, and as a rounded-down size needs it."""
    stated = same_pads(auto_pad, sizes, kernel, strides, dilations, pads)
    needed = []
    for size, k, stride, dilation, (begin, end) in zip(
        sizes, kernel, strides, dilations, stated, strict=True
    ):
        span = (k - 1) * dilation + 1
        steps = (size + begin + end - span) / stride
        count = (math.ceil(steps) if ceil else math.floor(steps)) + 1
        if ceil and (count - 1) * stride >= size + begin:  # it would start behind the image
            count -= 1
        needed.append((begin, max((count - 1) * stride + span - size - begin, end if not ceil else 0)))
    return stated, needed


def _plain(sides: Sides, kernel: Ints) -> bool:
    """Whether torch can pad by itself."""
    return all(begin == end and 2 * begin <= size for (begin, end), size in zip(sides, kernel, strict=True))


def max_pool(
    x: Tensor,
    *,
    kernel_shape: Ints,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Ints | None = None,
    pads: Ints | None = None,
    storage_order: int = 0,
    strides: Ints | None = None,
    outputs: int,
) -> tuple[Tensor, ...]:
    """MaxPool: (largest, their places in the flattened tensor)."""
    ones = (1,) * len(kernel_shape)
    strides, dilations = strides or ones, dilations or ones
    sizes = x.shape[2:]
    _, sides = _sides(sizes, kernel_shape, strides, dilations, pads, auto_pad, bool(ceil_mode))
    real = x if x.dtype.is_floating_point else x.float()
    pool = _MAX[len(kernel_shape)]
    if outputs == 1 and _plain(sides, kernel_shape):
        padding = [begin for begin, _ in sides]
        return (pool(real, kernel_shape, strides, padding, dilations).to(x.dtype),)
    padded = pad_sides(real, sides, -math.inf)
    if outputs == 1:
        return (pool(padded, kernel_shape, strides, 0, dilations).to(x.dtype),)
    found, places = pool(padded, kernel_shape, strides, 0, dilations, return_indices=True)
    return found.to(x.dtype), _places(places, x.shape, padded.shape[2:], sides, bool(storage_order))


def _places(
    places: Tensor, shape: Sequence[int], padded: Sequence[int], sides: Sides, by_column: bool
) -> Tensor:
    """Return indices into the flattened tensor from those into each padded plane."""
    axes = []
    for size, (begin, _) in zip(reversed(padded), reversed(sides), strict=True):
        axes.append(places % size - begin)
        places = places // size
    sizes = list(reversed(shape[2:]))
    flat, factor = torch.zeros_like(places), 1
    pairs = list(zip(axes, sizes, strict=True))
    for place, size in reversed(pairs) if by_column else pairs:
        flat, factor = flat + place * factor, factor * size
    planes = torch.arange(shape[0] * shape[1], device=places.device).reshape(shape[0], shape[1])
    return flat + planes.reshape(*planes.shape, *[1] * len(sizes)) * factor


def average_pool(
    x: Tensor,
    *,
    kernel_shape: Ints,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """AveragePool; padding is counted where asked to, what rounding the size up adds never is."""
    ones = (1,) * len(kernel_shape)
    strides, dilations = strides or ones, dilations or ones
    sizes = x.shape[2:]
    stated, sides = _sides(sizes, kernel_shape, strides, dilations, pads, auto_pad, bool(ceil_mode))
    if dilations == ones and stated == sides and _plain(sides, kernel_shape):
        padding = [begin for begin, _ in sides]
        pool = _AVERAGE[len(kernel_shape)]
        return pool(x, kernel_shape, strides, padding, False, bool(count_include_pad))  # type: ignore[no-any-return]
    counted = torch.ones(1, 1, *sizes, dtype=x.dtype, device=x.device)
    if count_include_pad:
        counted = pad_sides(counted, stated, 1)
        sides_left = [(0, need[1] - said[1]) for said, need in zip(stated, sides, strict=True)]
        counted = pad_sides(counted, sides_left)
    else:
        counted = pad_sides(counted, sides)
    sums = _window_sums(pad_sides(x, sides), kernel_shape, strides, dilations)
    return sums / _window_sums(counted, kernel_shape, strides, dilations)


def _window_sums(x: Tensor, kernel: Ints, strides: Ints, dilations: Ints) -> Tensor:
    ones = torch.ones(1, 1, *kernel, dtype=x.dtype, device=x.device)
    planes = x.reshape(-1, 1, *x.shape[2:])
    found: Tensor = _CONV[len(kernel)](planes, ones, None, strides, 0, dilations)
    return found.reshape(*x.shape[:2], *found.shape[2:])


def lp_pool(
    x: Tensor,
    *,
    kernel_shape: Ints,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Ints | None = None,
    p: int = 2,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """LpPool: the root of the sum of powers in each window."""
    ones = (1,) * len(kernel_shape)
    strides, dilations = strides or ones, dilations or ones
    _, sides = _sides(x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad, bool(ceil_mode))
    sums = _window_sums(pad_sides(x.abs() ** p, sides), kernel_shape, strides, dilations)
    return sums ** (1 / p)


def global_average_pool(x: Tensor) -> Tensor:
    """GlobalAveragePool."""
    return x.mean(tuple(range(2, x.ndim)), True)


def global_max_pool(x: Tensor) -> Tensor:
    """GlobalMaxPool."""
    return x.amax(tuple(range(2, x.ndim)), True)


def global_lp_pool(x: Tensor, *, p: int = 2) -> Tensor:
    """GlobalLpPool."""
    norm: Tensor = torch.linalg.vector_norm(x, p, tuple(range(2, x.ndim)), True)
    return norm


def max_unpool(
    x: Tensor,
    places: Tensor,
    output_shape: Any = None,
    *,
    kernel_shape: Ints,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """MaxUnpool: elements back at their places, zeros around."""
    rank = len(kernel_shape)
    strides, given = strides or (1,) * rank, pads or (0,) * (2 * rank)
    inferred = [
        (size - 1) * strides[i] + kernel_shape[i] - given[i] - given[i + rank]
        for i, size in enumerate(x.shape[2:])
    ]
    shape = [*x.shape[:2], *inferred]
    flat = x.new_zeros(math.prod(shape)).scatter(0, places.reshape(-1), x.reshape(-1)).reshape(shape)
    if output_shape is None:
        return flat
    wanted = integers(output_shape)
    return pad_sides(flat, [(0, size - had) for size, had in zip(wanted, shape, strict=True)])


ROWS: Rows = {
    "AveragePool": Row(average_pool, since=7),
    "GlobalAveragePool": Row(global_average_pool),
    "GlobalLpPool": Row(global_lp_pool, since=2),
    "GlobalMaxPool": Row(global_max_pool),
    "LpPool": Row(lp_pool, since=2),
    "MaxPool": Row(max_pool, many=True, extras=(Extra.OUTPUTS,)),
    "MaxUnpool": Row(max_unpool, host=(2,)),
}
