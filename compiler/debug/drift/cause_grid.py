# SPDX-License-Identifier: Apache-2.0
"""Causes: a value goes through a grid that does not fit it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from splitfold.compiler.debug.drift.sums import ordinary
from splitfold.passes.values import constant, int_attribute
from splitfold.runtime.feeds import Array

__all__ = ["Grid", "grid_note", "grids", "step_note"]

_OUTLIER = 8.0
"""How far a channel reaches beyond the median channel to be called an outlier."""
_FAR = 4.0
"""How much wider than the largest value around it a step is to be called far wider."""
_CLIPPED = 0.5
"""Share of a grid's error that clipping must make to be named as its cause."""
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """A node that rounds a value to a grid.

    Attributes:
        node: QuantizeLinear, DynamicQuantizeLinear or DynamicQuantizeMatMul.
        value: name of the value that it rounds, in the cut model.
        origin: name of the value that this is a scaled form of; the same where it is not scaled.
    """

    node: ir.Node
    value: str
    origin: str


def grids(part: Sequence[ir.Node]) -> list[Grid]:
    """Return the grids among the nodes of a part of the compiled model."""
    kinds = ("QuantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul")
    found = []
    for node in part:
        value = node.inputs[0] if node.op_type in kinds and node.inputs else None
        if value is not None and value.name and constant(value) is None:
            found.append(Grid(node, value.name, _origin(value)))
    return found


def _origin(value: ir.Value) -> str:
    """Return the name of what `value` is a constant multiple of, else its own."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Mul":
        first, second = producer.inputs
        for data, factor in ((first, second), (second, first)):
            if data is not None and data.name and constant(factor) is not None:
                return data.name
    return value.name or ""


@dataclass(frozen=True)
class _Loss:
    """What a grid does to the ordinary elements of a value.

    Attributes:
        relative: L2 norm of the error over that of the value.
        typical: the same in the median channel, where one channel alone is large; at least `relative`.
        step, low, high: of the grid.
        rms: of the value.
        clipped: share of elements beyond the ends of the grid.
        clipping: share of the error's energy that these make.
        outlier: words on a channel that reaches far beyond the others, or an empty text.
    """

    relative: float
    typical: float
    step: float
    low: float
    high: float
    rms: float
    clipped: float
    clipping: float
    outlier: str


def grid_note(
    found: Sequence[Grid], values: Mapping[str, Array], label: Callable[[str], str], local: float
) -> str:
    """Return what is wrong with the worst of the grids, or an empty text where none explains the error.

    Args:
        found: the grids.
        values: the values that they round, by name.
        label: gives the name to show for a value.
        local: relative error that is to be explained.
    """
    losses = [(grid, loss) for grid in found if (loss := _loss(grid.node, values[grid.value])) is not None]
    grid, loss = max(losses, key=lambda item: item[1].typical, default=(None, None))
    if grid is None or loss is None or loss.typical < local / 3:
        return ""
    name = f"{'' if grid.origin == grid.value else 'scaled '}input '{label(grid.origin)}'"
    if loss.step > loss.rms:
        return (
            f"its {name} goes through a grid of step {loss.step:.2g}, wider than the values "
            f"(rms {loss.rms:.2g}){_sentinel(values[grid.value])}"
        )
    if loss.clipping > _CLIPPED:
        return (
            f"the grid of its {name} ends at {loss.low:.3g} and {loss.high:.3g}: {loss.clipped:.2%} "
            f"of the elements are clipped"
        )
    median = f", {_db(loss.typical)} dB in the median channel" if loss.outlier else ""
    return (
        f"its {name} is rounded to steps of {loss.step:.2g} ({_db(loss.relative)} dB{median}){loss.outlier}"
    )


def _sentinel(array: Array) -> str:
    """Return words on the number that made a grid so wide, or an empty text."""
    far = array[~ordinary(array)]
    return f", made so by the {float(far[0]):.2g} in it" if far.size else ""


def step_note(part: Sequence[ir.Node], values: Iterable[Array]) -> str:
    """Return words on an operator on codes whose grid is far wider than all of `values`, or an empty text.

    What such an operator reads is nowhere in float: `values` are those around it.
    """
    largest = max((float(np.abs(array[ordinary(array)]).max(initial=0.0)) for array in values), default=0.0)
    for node in part:
        steps = [step for step in _steps_of(node) if step > _FAR * largest]
        if steps:
            wide = f"a grid of step {max(steps):.2g}, far wider than the values around it"
            return f"{node.op_type} computes on {wide}"
    return ""


def _steps_of(node: ir.Node) -> Iterable[float]:
    """Yield the scales of an operator on codes: each stands before its zero point."""
    for value, following in pairwise(node.inputs) if node.op_type.startswith("QLinear") else ():
        scale, zero = constant(value), constant(following)
        if scale is not None and zero is not None and scale.size == 1 and zero.dtype.is_integer():
            yield float(scale.numpy().reshape(-1)[0])


def _db(relative: float) -> str:
    return str(round(-20 * float(np.log10(relative)))) if relative else "infinite"


def _loss(node: ir.Node, array: Array) -> _Loss | None:
    kept = ordinary(array)
    grid = _linear(node) if node.op_type == "QuantizeLinear" else _dynamic(array)
    if array.dtype.kind != "f" or not kept.any() or grid is None:
        return None
    x = np.where(kept, array, 0).astype(np.float64)
    scale, zero = grid.along(array)
    codes = np.rint(x / scale) + zero
    outside = kept & ((codes < grid.lowest) | (codes > grid.highest))
    rounded = (np.clip(codes, grid.lowest, grid.highest) - zero) * scale
    error = np.where(kept, np.square(rounded - x), 0.0)
    energy, noise = float(np.square(x).sum()), float(error.sum())
    if not energy:
        return None
    relative = float(np.sqrt(noise / energy))
    outlier, typical = _outlier(x, error)
    return _Loss(
        relative,
        max(relative, typical),
        float(np.max(scale)),
        float(np.min((grid.lowest - zero) * scale)),
        float(np.max((grid.highest - zero) * scale)),
        float(np.sqrt(energy / kept.sum())),
        float(outside.sum() / kept.sum()),
        float(error[outside].sum()) / noise if noise else 0.0,
        outlier,
    )


def _outlier(x: _Floats, error: _Floats) -> tuple[str, float]:
    """Return words on a channel that makes the grid wide, and the relative error in the median channel; an
    empty text and 0 where there is none."""
    best, words, typical = _OUTLIER, "", 0.0
    for axis in (-1, 1) if x.ndim > 2 else (-1,):
        if x.ndim < 2 or x.shape[axis] < 4:
            continue
        channels = np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
        tops = np.abs(channels).max(1)
        middle = float(np.median(tops))
        if middle and float(tops.max()) / middle > best:
            best = float(tops.max()) / middle
            words = f": channel {int(tops.argmax())} reaches {best:.0f} times the median channel"
            noise = np.moveaxis(error, axis, 0).reshape(x.shape[axis], -1).sum(1)
            energy = np.square(channels).sum(1)
            typical = float(np.sqrt(np.median(noise[energy > 0] / energy[energy > 0])))
    return words, typical


@dataclass(frozen=True)
class _Steps:
    """Scale and zero point, of the whole or for each index of an axis, and the lowest and highest code."""

    scale: _Floats
    zero: _Floats
    axis: int
    lowest: int
    highest: int

    def along(self, array: Array) -> tuple[_Floats, _Floats]:
        """Return scale and zero point in a shape that broadcasts over `array`."""
        shape = [1] * array.ndim
        if self.scale.size > 1:
            shape[self.axis] = self.scale.size
        return self.scale.reshape(shape), self.zero.reshape(shape)


def _linear(node: ir.Node) -> _Steps | None:
    scale = constant(node.inputs[1])
    point = node.inputs[2] if len(node.inputs) > 2 else None
    zero = constant(point)
    if scale is None or (point is not None and zero is None) or int_attribute(node, "block_size", 0):
        return None
    steps = scale.numpy().astype(np.float64)
    offset = zero.numpy() if zero is not None else np.zeros(steps.shape, np.uint8)
    if offset.dtype.kind not in "iu":
        return None
    limits = np.iinfo(offset.dtype)
    axis = int_attribute(node, "axis", 1)
    return _Steps(steps, offset.astype(np.float64), axis, int(limits.min), int(limits.max))


def _dynamic(array: Array) -> _Steps:
    low, high = min(0.0, float(array.min(initial=0.0))), max(0.0, float(array.max(initial=0.0)))
    scale = np.array((high - low) / 255 or 1.0)
    return _Steps(scale, np.rint(-low / scale), 0, 0, 255)
