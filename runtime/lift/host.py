# SPDX-License-Identifier: Apache-2.0
"""Operators on numbers of the host: numpy arrays and integers that end up as shapes, axes and bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from splitfold.runtime.lift.carried import integers

__all__ = [
    "cast", "concat", "constant_of_shape", "divide", "expand", "gather", "identity", "largest", "modulo",
    "range_", "reduce_by", "reshape", "slice_", "smallest", "split", "squeeze", "tile", "transpose",
    "unsqueeze",
]  # fmt: skip


def identity(x: Any) -> Any:
    """Identity."""
    return np.asarray(x)


def gather(x: Any, indices: Any, *, axis: int = 0) -> Any:
    """Gather."""
    return np.asarray(x).take(np.asarray(indices), axis)


def concat(*arrays: Any, axis: int = 0) -> Any:
    """Concat."""
    return np.concatenate([np.asarray(array) for array in arrays], axis)


def slice_(x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:
    """Slice, opset 10."""
    array, first, last = np.asarray(x), integers(starts), integers(ends)
    chosen = range(len(first)) if axes is None else integers(axes)
    stride = [1] * len(first) if steps is None else integers(steps)
    slices = [slice(None)] * array.ndim
    for axis, start, end, step in zip(chosen, first, last, stride, strict=True):
        length = array.shape[axis]
        open_end = step < 0 and end < -length  # numpy would count it from the end
        slices[axis] = slice(start, None if open_end else end, step)
    return array[tuple(slices)]


def squeeze(x: Any, axes_given: Any = None, *, axes: tuple[int, ...] | None = None) -> Any:
    """Squeeze; axes are an input from opset 13."""
    chosen = axes if axes_given is None else integers(axes_given)
    return np.squeeze(np.asarray(x), None if chosen is None else tuple(chosen))


def unsqueeze(x: Any, axes_given: Any = None, *, axes: tuple[int, ...] = ()) -> Any:
    """Unsqueeze; axes are an input from opset 13."""
    return np.expand_dims(np.asarray(x), tuple(axes if axes_given is None else integers(axes_given)))


def reshape(x: Any, shape: Any, *, allowzero: int = 0) -> Any:
    """Reshape, opset 5."""
    array, wanted = np.asarray(x), integers(shape)
    if not allowzero:
        wanted = [array.shape[index] if size == 0 else size for index, size in enumerate(wanted)]
    return array.reshape(wanted)


def transpose(x: Any, *, perm: tuple[int, ...] | None = None) -> Any:
    """Transpose."""
    return np.transpose(np.asarray(x), perm)


def expand(x: Any, shape: Any) -> Any:
    """Expand."""
    array = np.asarray(x)
    return np.broadcast_to(array, np.broadcast_shapes(array.shape, tuple(integers(shape))))


def tile(x: Any, repeats: Any) -> Any:
    """Tile, opset 6."""
    return np.tile(np.asarray(x), integers(repeats))


def split(x: Any, sizes: Any = None, *, axis: int = 0, num_outputs: int | None = None, outputs: int) -> Any:
    """Split, opset 13."""
    array = np.asarray(x)
    if sizes is None:
        size = -(-array.shape[axis] // (num_outputs or outputs))
        cuts = [size * index for index in range(1, num_outputs or outputs)]
    else:
        cuts = np.cumsum(integers(sizes))[:-1].tolist()
    return tuple(np.split(array, cuts, axis))


def cast(x: Any, *, to: int, saturate: int = 1, round_mode: str = "up") -> Any:
    """Cast; `saturate` and `round_mode` are of types of 8 bits."""
    return np.asarray(x).astype(ir.DataType(to).numpy())


def divide(x: Any, y: Any) -> Any:
    """Div: integers are truncated."""
    first, second = np.asarray(x), np.asarray(y)
    if first.dtype.kind == "f":
        return first / second
    return (
        np.trunc(first / second).astype(first.dtype)
        if (first < 0).any() or (second < 0).any()
        else (first // second)
    )


def modulo(x: Any, y: Any, *, fmod: int = 0) -> Any:
    """Mod."""
    return np.fmod(x, y) if fmod else np.mod(x, y)


def smallest(*arrays: Any) -> Any:
    """Min of several arrays."""
    found = arrays[0]
    for array in arrays[1:]:
        found = np.minimum(found, array)
    return np.asarray(found)


def largest(*arrays: Any) -> Any:
    """Max of several arrays."""
    found = arrays[0]
    for array in arrays[1:]:
        found = np.maximum(found, array)
    return np.asarray(found)


def constant_of_shape(shape: Any, *, value: tuple[Any, Any] = (0.0, None)) -> Any:
    """ConstantOfShape; `value` is a number and its torch type."""
    number, dtype = value
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    return np.full(integers(shape), number, name)


def range_(start: Any, limit: Any, delta: Any) -> Any:
    """Range."""
    bounds: Any = (start, limit, delta)
    return np.arange(*bounds, dtype=np.asarray(start).dtype)


def reduce_by(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a reduction; axes are an input from opset 13 (ReduceSum) or 18."""

    def reduce(
        x: Any,
        axes_given: Any = None,
        *,
        axes: tuple[int, ...] | None = None,
        keepdims: int = 1,
        noop_with_empty_axes: int = 0,
    ) -> Any:
        array = np.asarray(x)
        chosen = list(axes or ()) if axes_given is None else integers(axes_given)
        if not chosen and noop_with_empty_axes:
            return array
        found = function(array, axis=tuple(chosen) or None, keepdims=bool(keepdims))
        return np.asarray(found).astype(array.dtype)

    return reduce
