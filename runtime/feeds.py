# SPDX-License-Identifier: Apache-2.0
"""Feeds: one set of inputs for a model, by name; and seeded synthetic ones where the user gave none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from splitfold.runtime.errors import UnsupportedError, did_you_mean

__all__ = ["Array", "Feeds", "check_feeds", "model_inputs", "synthetic_feeds"]

Array = np.ndarray[tuple[Any, ...], np.dtype[Any]]
Feeds = Mapping[str, Array]
"""Inputs of one run: array by input name."""

_BATCH = 2
"""Size of an unknown dimension on axis 0."""


def model_inputs(model: ir.Model) -> list[ir.Value]:
    """Return the graph inputs that a caller must feed: those without a default value (initializer)."""
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def check_feeds(model: ir.Model, feeds: Feeds, *, where: str = "the feeds") -> None:
    """Raise ``ValueError`` with the first mismatch of `feeds` against the model's inputs (name, rank, size,
    dtype, NaN)."""
    known = {value.name or "": value for value in model.graph.inputs}
    for name in feeds:
        if name not in known:
            raise ValueError(
                f"{where} hold '{name}', which is not an input of the model."
                f"{did_you_mean(name, known)} Inputs: {', '.join(known)}."
            )
    for value in model_inputs(model):
        if value.name not in feeds:
            raise ValueError(
                f"{where} lack the input '{value.name}'. Given: {', '.join(feeds) or 'nothing'}."
            )
    for name, array in feeds.items():
        _check_array(known[name], np.asarray(array), where)


def _check_array(value: ir.Value, array: Array, where: str) -> None:
    if value.dtype is not None and value.dtype != ir.DataType.STRING and array.dtype != value.dtype.numpy():
        raise ValueError(
            f"{where}: '{value.name}' is {array.dtype}, the model expects {value.dtype.numpy()}."
        )
    if value.shape is not None and not _fits(value.shape, array.shape):
        raise ValueError(
            f"{where}: '{value.name}' has shape {list(array.shape)}, the model expects {value.shape}."
        )
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise ValueError(f"{where}: '{value.name}' holds NaN.")


def _fits(shape: ir.Shape, actual: Sequence[int]) -> bool:
    if len(shape) != len(actual):
        return False
    return all(not isinstance(dim, int) or dim == size for dim, size in zip(shape, actual, strict=True))


def synthetic_feeds(model: ir.Model, *, seed: int = 0, size: int = 8) -> dict[str, Array]:
    """Return seeded feeds of the right shapes and dtypes and of plausible ranges.

    Dimensions of one symbolic name get one size everywhere (2 on axis 0, `size` elsewhere), and sums of names
    (``past + sequence``) the sum of theirs. Floats are standard normal, integers are indices that the tables
    they select from can hold (else 0 or 1), masks (`*mask*`) are ones, booleans are true.

    Raises:
        UnsupportedError: an input is not a tensor, or its rank is unknown.
    """
    rng = np.random.default_rng(seed)
    sizes = _Sizes(size)
    return {value.name or "": _synthetic(value, rng, sizes) for value in model_inputs(model)}


class _Sizes(dict[str, int]):
    """Sizes given to symbolic dimensions so far."""

    def __init__(self, default: int) -> None:
        super().__init__()
        self._default = default

    def of(self, dim: int | ir.SymbolicDim, axis: int) -> int:
        if isinstance(dim, int) and dim >= 0:
            return dim
        size = self._default if axis else _BATCH  # some exporters write -1 for unknown
        name = dim.value if isinstance(dim, ir.SymbolicDim) else None
        if name is None:
            return size
        parts = [part.strip() for part in name.split("+")]
        if len(parts) > 1 and all(part.isidentifier() for part in parts):
            return sum(self.setdefault(part, self._default) for part in parts)
        return self.setdefault(name, size)


def _synthetic(value: ir.Value, rng: np.random.Generator, sizes: _Sizes) -> Array:
    if value.shape is None or value.dtype is None or not isinstance(value.type, ir.TensorType):
        raise UnsupportedError(
            f"no synthetic feed can be made for input '{value.name}' ({value.type}, shape unknown): pass "
            "example inputs."
        )
    shape = [sizes.of(dim, axis) for axis, dim in enumerate(value.shape)]
    if value.dtype == ir.DataType.STRING:
        return np.full(shape, "text", dtype=object)
    dtype = value.dtype.numpy()
    if value.dtype == ir.DataType.BOOL or "mask" in (value.name or "").lower():
        return np.ones(shape, dtype)
    if value.dtype.is_integer():
        return rng.integers(0, _index_limit(value), shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


_KEEPS_VALUES = {
    "Cast",
    "Expand",
    "Flatten",
    "Identity",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}


def _index_limit(value: ir.Value) -> int:
    """Return the row count of the smallest table that `value` indexes, through moves and casts; 2 where it
    indexes none."""
    rows: list[int] = []
    pending, seen = [value], {value}
    while pending:
        for use in pending.pop().uses():
            node = use.node
            if node.op_type == "Gather" and use.idx == 1:
                rows.extend(_rows(node.inputs[0]))
            elif node.op_type in _KEEPS_VALUES and use.idx == 0:
                new = [output for output in node.outputs if output not in seen]
                seen.update(new)
                pending.extend(new)
    return max(2, min(rows, default=2))


def _rows(table: ir.Value | None) -> list[int]:
    shape = table.shape if table is not None and table.is_initializer() else None
    return [shape[0]] if shape is not None and len(shape) == 2 and isinstance(shape[0], int) else []
