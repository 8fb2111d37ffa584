# SPDX-License-Identifier: Apache-2.0
"""How a scale for each channel moves through operators that are equivariant to it: f(x / s) = f(x) / s'.

A scale is described by *marks*: an integer array with the rank of the value, of size 1 along axes on which
the scale does not depend. Elements with one mark share one scale; `FREE` is a scale of 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from splitfold.passes.values import constant, int_attribute, ints_attribute

__all__ = ["FREE", "Marks", "NotEquivariantError", "aligned", "backward", "forward"]

Marks = npt.NDArray[np.int64]

FREE = -1
"""Mark of elements that keep a scale of 1."""


class NotEquivariantError(Exception):
    """A scale cannot pass an operator; the message says why, for the user."""


Rule = Callable[[ir.Node, int, Marks, bool], Marks]
"""(node, operand or output, marks there, whether backward) to the marks on the other side."""


def forward(node: ir.Node, operand: int, marks: Marks) -> list[tuple[int, Marks]]:
    """Return (output, marks) of every output that is scaled where input `operand` is.

    Raises:
        NotEquivariantError: the operator does not pass the scale on.
    """
    if node.op_type == "Split" and node.domain == "":
        return [(at, part) for at, part in enumerate(_split(node, marks)) if (part != FREE).any()]
    return [(0, _rule(node)(node, operand, marks, False))]


def backward(node: ir.Node, output: int, marks: Marks, operand: int) -> Marks:
    """Return the marks that input `operand` must have for output `output` to have `marks`.

    Raises:
        NotEquivariantError: no scale of the operand gives it.
    """
    if node.op_type == "Split" and node.domain == "":
        return _unsplit(node, output, marks)
    return _rule(node)(node, operand, marks, True)


def aligned(marks: Marks, rank: int) -> Marks:
    """Return `marks` for an operand of `rank` axes that is broadcast to what has `marks`.

    Raises:
        NotEquivariantError: the scale stands on an axis that the operand lacks.
    """
    if marks.ndim <= rank:
        return marks.reshape([1] * (rank - marks.ndim) + list(marks.shape))
    if any(size != 1 for size in marks.shape[: marks.ndim - rank]):
        raise NotEquivariantError("it is broadcast along the scaled axis")
    return marks.reshape(marks.shape[marks.ndim - rank :])


def _rule(node: ir.Node) -> Rule:
    rule = _RULES.get(node.op_type) if node.domain == "" else None
    if rule is None:
        raise NotEquivariantError(f"{node.op_type} does not pass a scale on")
    return rule


def _rank(value: ir.Value | None) -> int:
    if value is None or value.shape is None:
        raise NotEquivariantError("a shape is unknown")
    return len(value.shape)


def _dims(value: ir.Value | None) -> list[int | None]:
    if value is None or value.shape is None:
        raise NotEquivariantError("a shape is unknown")
    return [dim if isinstance(dim, int) else None for dim in value.shape]


def _operand(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise NotEquivariantError(f"{node.op_type} has no input {index}")
    return value


def _same(node: ir.Node, operand: int, marks: Marks, back: bool) -> Marks:
    if operand:
        raise NotEquivariantError(f"{node.op_type} reads it as a parameter")
    return marks


def _elementwise(node: ir.Node, operand: int, marks: Marks, back: bool) -> Marks:
    """Broadcasting operators: axes are aligned from the right."""
    marks = aligned(marks, _rank(_operand(node, operand)) if back else _rank(node.outputs[0]))
    return _narrowed(marks, _dims(_operand(node, operand))) if back else marks


def _narrowed(marks: Marks, dims: Sequence[int | None]) -> Marks:
    """Return the marks of an operand that is broadcast: its one element takes the first mark; going forward
    again ties the others to it."""
    for axis, dim in enumerate(dims):
        if dim == 1 and marks.shape[axis] > 1:
            marks = marks.take([0], axis)
    return marks


def _ratio(node: ir.Node, operand: int, marks: Marks, back: bool) -> Marks:
    if operand:
        raise NotEquivariantError("it is the divisor of a Div")
    return _elementwise(node, operand, marks, back)


def _selected(node: ir.Node, operand: int, marks: Marks, back: bool) -> Marks:
    if operand == 0:
        raise NotEquivariantError("it is the condition of a Where")
    return _elementwise(node, operand, marks, back)


def _transposed(node: ir.Node, operand: int, marks: Marks, back: bool) -> Marks:
    perm = ints_attribute(node, "perm") or tuple(reversed(range(marks.ndim)))
    return marks.transpose(np.argsort(perm) if back else perm)


def _has(node: ir.Node, index: int) -> bool:
    return len(node.inputs) > index and node.inputs[index] is not None


def _constant_ints(node: ir.Node, index: int) -> list[int]:
    tensor = constant(_operand(node, index))
    if tensor is None:
        raise NotEquivariantError(f"{node.op_type} computes its parameters")
    return [int(item) for item in np.asarray(tensor.numpy()).reshape(-1)]


def _reshaped(node: ir.Node, operand: int, marks: Marks, back: bool) -> Marks:
    """Reshape, Flatten, Squeeze, Unsqueeze: axes are matched from the right, in groups of equal products."""
    if operand:
        raise NotEquivariantError("it is the shape of a Reshape")
    before, after = _dims(_operand(node, 0)), _dims(node.outputs[0])
    return _regroup(marks, after, before) if back else _regroup(marks, before, after)


def _regroup(marks: Marks, source: Sequence[int | None], target: Sequence[int | None]) -> Marks:
    source = [size if size > 1 else dim for size, dim in zip(marks.shape, source, strict=True)]
    shape: list[int] = []
    marked, left, right = list(marks.shape), len(source), len(target)
    pieces: list[Marks] = [marks]
    while left and right:
        left, right, group, out = _next_group(source, target, left, right)
        sizes = marked[left : left + group]
        if all(size == 1 for size in sizes):
            shape = [1] * out + shape
            continue
        dims = [dim or 1 for dim in source[left : left + group]]
        full = [*marked[:left], *dims, *marked[left + group :]]
        pieces[0] = np.broadcast_to(pieces[0], full)
        marked = full
        shape = [dim or 1 for dim in target[right : right + out]] + shape
    if any(size != 1 for size in marked[:left]):
        raise NotEquivariantError("a Reshape merges the scaled axis with others")
    return np.ascontiguousarray(pieces[0]).reshape([1] * right + shape)


def _next_group(
    source: Sequence[int | None], target: Sequence[int | None], left: int, right: int
) -> tuple[int, int, int, int]:
    """Return (left, right, axes of source, axes of target) of the smallest group of axes, to the left of
    where we are, that hold equally many elements."""
    a, b = left - 1, right - 1
    x, y = source[a], target[b]
    while x != y:
        if x is None or y is None:
            if x == 1 and a > 0:
                x, a = source[a - 1], a - 1
            elif y == 1 and b > 0:
                y, b = target[b - 1], b - 1
            else:
                raise NotEquivariantError("a Reshape merges an axis of unknown size")
        elif x < y and a > 0:
            a -= 1
            x = None if source[a] is None else x * (source[a] or 1)
        elif x > y and b > 0:
            b -= 1
            y = None if target[b] is None else y * (target[b] or 1)
        else:
            raise NotEquivariantError("a Reshape does not keep the axes apart")
    return a, b, left - a, right - b


def _concatenated(node: ir.Node, operand: int, marks: Marks, back: bool) -> Marks:
    axis = int_attribute(node, "axis", 0) % marks.ndim
    if marks.shape[axis] == 1:
        return marks
    sizes = [_dims(value)[axis] for value in node.inputs]
    if any(size is None for size in sizes):
        raise NotEquivariantError("a Concat of unknown sizes")
    ends = np.cumsum([size or 0 for size in sizes])
    start, end = int(ends[operand] - (sizes[operand] or 0)), int(ends[operand])
    if back:
        return marks.take(range(start, end), axis)
    shape = list(marks.shape)
    shape[axis] = int(ends[-1])
    whole = np.full(shape, FREE, np.int64)
    whole[(slice(None),) * axis + (slice(start, end),)] = marks
    return whole


def _parts(node: ir.Node, axis: int) -> list[int]:
    sizes = [_dims(output)[axis] for output in node.outputs]
    if any(size is None for size in sizes):
        raise NotEquivariantError("a Split of unknown sizes")
    return [size or 0 for size in sizes]


def _split(node: ir.Node, marks: Marks) -> list[Marks]:
    axis = int_attribute(node, "axis", 0) % marks.ndim
    if marks.shape[axis] == 1:
        return [marks for _ in node.outputs]
    return list(np.split(marks, np.cumsum(_parts(node, axis))[:-1], axis))


def _unsplit(node: ir.Node, output: int, marks: Marks) -> Marks:
    axis = int_attribute(node, "axis", 0) % marks.ndim
    sizes = _parts(node, axis)
    shape = list(marks.shape)
    shape[axis] = sum(sizes)
    whole = np.full(shape, FREE, np.int64)
    start = sum(sizes[:output])
    whole[(slice(None),) * axis + (slice(start, start + sizes[output]),)] = marks
    return whole


def _tiled(node: ir.Node, operand: int, marks: Marks, back: bool) -> Marks:
    if operand:
        raise NotEquivariantError("it is the repeats of a Tile")
    repeats = _constant_ints(node, 1)
    if not back:
        return np.tile(
            marks, [times if size > 1 else 1 for size, times in zip(marks.shape, repeats, strict=True)]
        )
    for axis, times in enumerate(repeats):
        if marks.shape[axis] > 1:
            marks = marks.take(range(marks.shape[axis] // times), axis)
    return marks


def _gathered(node: ir.Node, operand: int, marks: Marks, back: bool) -> Marks:
    """Gather of constant positions; along an axis without scales any positions do."""
    if operand:
        raise NotEquivariantError("it is an index")
    rank = _rank(_operand(node, 0))
    axis = int_attribute(node, "axis", 0) % rank
    index_rank = _rank(_operand(node, 1))
    if back:
        inner = marks.shape[axis : axis + index_rank]
        if all(size == 1 for size in inner):
            plain = marks.reshape([*marks.shape[:axis], 1, *marks.shape[axis + index_rank :]])
            return plain if index_rank else _placed(node, plain, axis)
        raise NotEquivariantError("a Gather picks scaled channels")
    if marks.shape[axis] != 1:
        picks = np.asarray(_constant_ints(node, 1)).reshape(-1)
        if index_rank:
            raise NotEquivariantError("a Gather picks scaled channels")
        return np.asarray(marks.take(int(picks[0]), axis))
    return marks.reshape(marks.shape[:axis] + (1,) * index_rank + marks.shape[axis + 1 :])


def _placed(node: ir.Node, marks: Marks, axis: int) -> Marks:
    """Return marks of the whole where a scalar Gather picks one position of a short static axis (q, k or v of
    a stack)."""
    size = _dims(_operand(node, 0))[axis]
    if size is None:
        return marks
    shape = list(marks.shape)
    shape[axis] = size
    whole = np.full(shape, FREE, np.int64)
    whole[(slice(None),) * axis + (_constant_ints(node, 1)[0] % size,)] = marks.take(0, axis)
    return whole


def _sliced(node: ir.Node, operand: int, marks: Marks, back: bool) -> Marks:
    if operand:
        raise NotEquivariantError("it is a bound of a Slice")
    starts, ends = _constant_ints(node, 1), _constant_ints(node, 2)
    axes = _constant_ints(node, 3) if _has(node, 3) else list(range(len(starts)))
    steps = _constant_ints(node, 4) if _has(node, 4) else [1] * len(starts)
    dims = _dims(_operand(node, 0))
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis %= marks.ndim
        if marks.shape[axis] == 1:
            continue
        size = dims[axis]
        if size is None:
            raise NotEquivariantError("a Slice of an axis of unknown size")
        picks = range(size)[slice(start, end, step)]
        if not back:
            marks = marks.take(picks, axis)
            continue
        whole = np.full([*marks.shape[:axis], size, *marks.shape[axis + 1 :]], FREE, np.int64)
        whole[(slice(None),) * axis + (list(picks),)] = marks
        marks = whole
    return marks


def _reduced(node: ir.Node, operand: int, marks: Marks, back: bool) -> Marks:
    """ReduceMean, ReduceSum and ReduceMax over axes without scales."""
    if operand:
        raise NotEquivariantError("it names axes")
    rank = _rank(_operand(node, 0))
    given = ints_attribute(node, "axes") or (tuple(_constant_ints(node, 1)) if _has(node, 1) else range(rank))
    axes = sorted(axis % rank for axis in given)
    keep = int_attribute(node, "keepdims", 1)
    if back:
        whole = marks if keep else marks.reshape(_with_ones(marks.shape, axes, rank))
        if any(whole.shape[axis] != 1 for axis in axes):
            raise NotEquivariantError("a reduction over the scaled axis")
        return whole
    if any(marks.shape[axis] != 1 for axis in axes):
        raise NotEquivariantError(f"{node.op_type} mixes the scaled channels")
    left = [size for axis, size in enumerate(marks.shape) if axis not in axes]
    return marks if keep else marks.reshape(left)


def _with_ones(shape: Sequence[int], axes: Sequence[int], rank: int) -> list[int]:
    rest = iter(shape)
    return [1 if axis in axes else next(rest) for axis in range(rank)]


def _pooled(node: ir.Node, operand: int, marks: Marks, back: bool) -> Marks:
    if any(size != 1 for axis, size in enumerate(marks.shape) if axis != 1):
        raise NotEquivariantError("pooling along the scaled axis")
    return marks


def _padded(node: ir.Node, operand: int, marks: Marks, back: bool) -> Marks:
    if operand:
        raise NotEquivariantError("it is a parameter of a Pad")
    value = constant(node.inputs[2]) if _has(node, 2) else None
    if _has(node, 2) and (value is None or np.any(value.numpy() != 0)):
        raise NotEquivariantError("a Pad with something else than zeros")
    pads = _constant_ints(node, 1)
    rank = marks.ndim
    if len(pads) != 2 * rank or any(marks.shape[a] != 1 and (pads[a] or pads[a + rank]) for a in range(rank)):
        raise NotEquivariantError("a Pad of the scaled axis")
    return marks


def _mixed(node: ir.Node, operand: int, marks: Marks, back: bool) -> Marks:
    """MatMul of two computed values (attention times V): the scale stands on an axis that is kept."""
    rank = _rank(node.outputs[0])
    if rank < 2 or any(_rank(value) != rank for value in node.inputs):
        raise NotEquivariantError("a MatMul of values of different rank")
    foreign = rank - 1 if operand == 0 else rank - 2
    if marks.shape[foreign] != 1:
        raise NotEquivariantError(
            "a MatMul makes the scaled axis from its other operand"
            if back
            else "a MatMul sums over the scaled channels"
        )
    return _narrowed(marks, _dims(_operand(node, operand))) if back else marks


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("Relu", "LeakyRelu", "Abs", "Neg", "Identity", "Dropout", "Cast"), _same),
    **dict.fromkeys(("Add", "Sub", "Mul", "Sum", "Max", "Min"), _elementwise),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshaped),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"), _reduced),
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), _pooled),
    "Concat": _concatenated,
    "Div": _ratio,
    "Expand": _elementwise,
    "Gather": _gathered,
    "MatMul": _mixed,
    "Pad": _padded,
    "Slice": _sliced,
    "Tile": _tiled,
    "Transpose": _transposed,
    "Where": _selected,
}
