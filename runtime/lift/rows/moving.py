# SPDX-License-Identifier: Apache-2.0
"""Operators that move elements by shape and axis: Reshape, Transpose, Concat, Slice, Pad..."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from splitfold.runtime.lift import host
from splitfold.runtime.lift.carried import integers
from splitfold.runtime.lift.row import Extra, Row, Rows, since

__all__ = ["ROWS", "identity", "pad_sides"]


def identity(x: Any) -> Any:
    """Identity."""
    return x


def reshape(x: Tensor, shape: Any, *, allowzero: int = 0) -> Tensor:
    """Reshape, opset 5: 0 keeps a size, -1 is the rest."""
    wanted = integers(shape)
    if not allowzero and 0 in wanted:
        wanted = [x.shape[index] if size == 0 else size for index, size in enumerate(wanted)]
    return x.reshape(wanted)


def transpose(x: Tensor, *, perm: tuple[int, ...] | None = None) -> Tensor:
    """Transpose."""
    return x.permute(perm if perm is not None else tuple(reversed(range(x.ndim))))


def concat(*tensors: Tensor, axis: int = 1) -> Tensor:
    """Concat."""
    return torch.cat(tensors, axis)


def split(
    x: Tensor, sizes: Any = None, *, axis: int = 0, num_outputs: int | None = None, outputs: int
) -> tuple[Tensor, ...]:
    """Split, opset 13: without sizes equal parts, the last one smaller where need be."""
    if sizes is not None:
        return torch.split(x, integers(sizes), axis)
    count = num_outputs or outputs
    size = -(-x.shape[axis] // count)
    return torch.split(x, [size] * (count - 1) + [x.shape[axis] - size * (count - 1)], axis)


def split_by_attribute(
    x: Tensor, *, axis: int = 0, split: tuple[int, ...] | None = None, outputs: int
) -> tuple[Tensor, ...]:
    """Split, opset 2."""
    return torch.split(x, list(split) if split else x.shape[axis] // outputs, axis)


def slice_(x: Tensor, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Tensor:
    """Slice, opset 10, in the ways of Python's slices."""
    first, last = integers(starts), integers(ends)
    chosen = range(len(first)) if axes is None else integers(axes)
    stride = [1] * len(first) if steps is None else integers(steps)
    for axis, start, end, step in zip(chosen, first, last, stride, strict=True):
        x = _slice_axis(x, axis, start, end, step)
    return x


def _slice_axis(x: Tensor, axis: int, start: int, end: int, step: int) -> Tensor:
    length = x.shape[axis]
    places = range(length)[start : (None if step < 0 and end < -length else end) : step]
    if not places:
        return x.narrow(axis, 0, 0)
    low, high = min(places[0], places[-1]), max(places[0], places[-1])
    index = (slice(None),) * (axis % x.ndim) + (slice(low, high + 1, abs(step)),)
    return x[index] if step > 0 else x[index].flip(axis)


def slice_by_attributes(
    x: Tensor, *, starts: tuple[int, ...], ends: tuple[int, ...], axes: tuple[int, ...] | None = None
) -> Tensor:
    """Slice, opset 1."""
    return slice_(x, starts, ends, axes)


def squeeze(x: Tensor, axes_given: Any = None, *, axes: tuple[int, ...] | None = None) -> Tensor:
    """Squeeze; axes are an input from opset 13."""
    chosen = axes if axes_given is None else integers(axes_given)
    return x.squeeze() if chosen is None else x.squeeze(tuple(chosen))


def unsqueeze(x: Tensor, axes_given: Any = None, *, axes: tuple[int, ...] = ()) -> Tensor:
    """Unsqueeze: axes, an input from opset 13, are those of the result."""
    chosen = axes if axes_given is None else integers(axes_given)
    for axis in sorted(axis % (x.ndim + len(chosen)) for axis in chosen):
        x = x.unsqueeze(axis)
    return x


def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """Flatten to a matrix."""
    at = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:at]), math.prod(x.shape[at:]))


def expand(x: Tensor, shape: Any) -> Tensor:
    """Expand: both shapes broadcast."""
    return x.expand(np.broadcast_shapes(x.shape, tuple(integers(shape))))


def tile(x: Tensor, repeats: Any) -> Tensor:
    """Tile, opset 6."""
    return x.repeat(integers(repeats))


def pad(x: Tensor, pads: Any, value: Any = None, axes: Any = None, *, mode: str = "constant") -> Tensor:
    """Pad, opset 11; `axes` from opset 18. Negative pads crop."""
    sides = integers(pads)
    half = len(sides) // 2
    chosen = range(half) if axes is None else [axis % x.ndim for axis in integers(axes)]
    begins = dict(zip(chosen, sides[:half], strict=True))
    ends = dict(zip(chosen, sides[half:], strict=True))
    if mode == "constant":
        number = value.item() if isinstance(value, Tensor) else value
        pairs = [(begins.get(axis, 0), ends.get(axis, 0)) for axis in range(x.ndim)]
        return pad_sides(x, pairs, number or 0)
    for axis in chosen:
        x = _pad_by_index(x, axis, begins[axis], ends[axis], mode)
    return x


def pad_sides(x: Tensor, pairs: list[tuple[int, int]], value: float = 0) -> Tensor:
    """Return `x` with (begin, end) elements of `value` added to its last axes, one pair an axis."""
    sides = [number for pair in reversed(pairs) for number in pair]
    return F.pad(x, sides, value=value) if any(sides) else x


def _pad_by_index(x: Tensor, axis: int, begin: int, end: int, mode: str) -> Tensor:
    x = x.narrow(axis, max(-begin, 0), x.shape[axis] - max(-begin, 0) - max(-end, 0))
    if begin <= 0 and end <= 0:
        return x
    how: Any = mode
    places = np.pad(np.arange(x.shape[axis]), (max(begin, 0), max(end, 0)), how)
    return x.index_select(axis, torch.from_numpy(places).to(x.device))


def pad_by_attributes(
    x: Tensor, *, pads: tuple[int, ...], mode: str = "constant", value: float = 0.0
) -> Tensor:
    """Pad, opset 2."""
    return pad(x, pads, value, mode=mode)


def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """DepthToSpace."""
    n, c, h, w = x.shape
    b, rest = blocksize, c // blocksize**2
    if mode == "DCR":
        split_up = x.reshape(n, b, b, rest, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        split_up = x.reshape(n, rest, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return split_up.reshape(n, rest, h * b, w * b)


def space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """SpaceToDepth; `mode` from opset 28."""
    n, c, h, w = x.shape
    b = blocksize
    split_up = x.reshape(n, c, h // b, b, w // b, b)
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return split_up.permute(order).reshape(n, c * b * b, h // b, w // b)


def center_crop_pad(x: Tensor, shape: Any, *, axes: tuple[int, ...] | None = None) -> Tensor:
    """CenterCropPad."""
    for axis, wanted in zip(axes or range(x.ndim), integers(shape), strict=True):
        surplus = x.shape[axis] - wanted
        if surplus > 0:
            x = x.narrow(axis, surplus // 2, wanted)
        elif surplus < 0:
            before = -surplus // 2
            pairs = [(0, 0)] * x.ndim
            pairs[axis] = (before, -surplus - before)
            x = pad_sides(x, pairs)
    return x


ROWS: Rows = {
    "CenterCropPad": Row(center_crop_pad, host=(1,)),
    "Concat": Row(concat, on_host=host.concat),
    "DepthToSpace": Row(depth_to_space),
    "Expand": Row(expand, host=(1,), on_host=host.expand, creates=True, passes_codes=True),
    "Flatten": Row(flatten, passes_codes=True),
    "Identity": Row(identity, on_host=host.identity, passes_codes=True),
    "Pad": since(11, Row(pad, host=(1, 3), scalars=(2,)), Row(pad_by_attributes)),
    "Reshape": Row(reshape, host=(1,), on_host=host.reshape, passes_codes=True, since=5),
    "Slice": since(
        10,
        Row(slice_, host=(1, 2, 3, 4), on_host=host.slice_, passes_codes=True),
        Row(slice_by_attributes),
    ),
    "SpaceToDepth": Row(space_to_depth),
    "Split": since(
        13,
        Row(split, host=(1,), on_host=host.split, many=True, extras=(Extra.OUTPUTS,)),
        Row(split_by_attribute, many=True, extras=(Extra.OUTPUTS,), since=2),
    ),
    "Squeeze": Row(squeeze, host=(1,), on_host=host.squeeze, passes_codes=True),
    "Tile": Row(tile, host=(1,), on_host=host.tile, creates=True, since=6),
    "Transpose": Row(transpose, on_host=host.transpose, passes_codes=True),
    "Unsqueeze": Row(unsqueeze, host=(1,), on_host=host.unsqueeze, passes_codes=True),
}
