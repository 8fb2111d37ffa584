# SPDX-License-Identifier: Apache-2.0
"""What a term of the logits is for: mask, position bias or content bias; and whether a mask is causal.

Causality is decided by computing the mask with intervals, for any pair of positions of which the key stands
after the query: comparisons of positions, triangles and constants are then known, padding is not.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitfold.passes.attention_axes import AxisMap, axis_map
from splitfold.passes.attention_block import ScoreTerm, TermKind
from splitfold.passes.attention_scores import MOVING, is_stored
from splitfold.passes.symbolic_shapes import SymbolicShapes
from splitfold.passes.values import constant, int_attribute

__all__ = ["additive_terms", "condition_term"]

_LOW = -50.0
"""A number that blocks: Swin writes -100, others -1e4 and lower."""
_VERY_LOW = -1e4
_DEPTH = 40


def condition_term(
    condition: ir.Value, *, blocks: bool, key_from_right: int, shapes: SymbolicShapes
) -> ScoreTerm:
    """Return the term of a Where whose other branch is low.

    Args:
        condition: of the Where.
        blocks: whether a position is blocked where the condition holds, rather than where it does not.
        key_from_right: the axis of keys, counted from the right: 1 is the last.
        shapes: of the model.
    """
    ahead = _Ahead(shapes).of(condition, *_axes(condition, key_from_right, shapes), _DEPTH)
    causal = ahead.is_true if blocks else ahead.is_false
    return ScoreTerm(condition, TermKind.MASK, causal, blocks)


def additive_terms(
    value: ir.Value, key_from_right: int, shapes: SymbolicShapes, projections: Collection[ir.Node]
) -> Iterator[ScoreTerm]:
    """Yield the terms that make up `value`, which is added to scores: sums are taken apart.

    Args:
        value: what is added.
        key_from_right: the axis of keys, counted from the right.
        shapes: of the model.
        projections: the layers that queries and keys come from.
    """
    producer = value.producer()
    if producer is not None and producer.op_type == "Add" and not is_stored(value):
        parts = [part for part in producer.inputs if part is not None]
        if len({_can_block(part, _DEPTH) for part in parts}) > 1:
            for part in parts:
                yield from additive_terms(part, key_from_right, shapes, projections)
            return
    if _can_block(value, _DEPTH):
        ahead = _Ahead(shapes).of(value, *_axes(value, key_from_right, shapes), _DEPTH)
        yield ScoreTerm(value, TermKind.MASK, ahead.high <= _LOW)
        for bias in _unblocked(value):
            yield from additive_terms(bias, key_from_right, shapes, projections)
    elif _comes_from(value, projections):
        yield ScoreTerm(value, TermKind.CONTENT_BIAS)
    else:
        yield ScoreTerm(value, TermKind.POSITION_BIAS)


def _unblocked(value: ir.Value) -> Iterator[ir.Value]:
    """Yield what a mask adds where it does not block, if that is computed: a bias that was masked."""
    producer = value.producer()
    if producer is None or producer.op_type != "Where":
        return
    branches = [branch for branch in producer.inputs[1:] if branch is not None]
    kept = [branch for branch in branches if not _can_block(branch, _DEPTH)]
    if len(branches) == 2 and len(kept) == 1 and kept[0].producer() is not None and not is_stored(kept[0]):
        yield kept[0]


def _axes(value: ir.Value, key_from_right: int, shapes: SymbolicShapes) -> tuple[int | None, int | None]:
    """Return the axes of keys and of queries of a value that is broadcast against scores."""
    rank = shapes.rank(value)
    if rank is None:
        return None, None
    query_from_right = 2 if key_from_right == 1 else 1
    key, query = rank - key_from_right, rank - query_from_right
    return key if key >= 0 else None, query if query >= 0 else None


def _comes_from(value: ir.Value, projections: Collection[ir.Node]) -> bool:
    seen: set[ir.Node] = set()
    pending = [value.producer()]
    while pending:
        node = pending.pop()
        if node is None or node in seen or node.op_type == "Shape":
            continue
        if node in projections:
            return True
        seen.add(node)
        pending.extend(operand.producer() for operand in node.inputs if operand is not None)
    return False


_SPREADS = {"Add", "Clip", "Concat", "Max", "Min", "Mul", "Neg", "Slice", "Sub", "Trilu"} | MOVING


def _can_block(value: ir.Value, depth: int) -> bool:
    """Whether a number low enough to block stands among the constants that `value` is made of; a graph input
    that is added to scores is taken for a mask."""
    tensor, producer = constant(value), value.producer()
    if tensor is not None:
        return _holds_sentinel(np.asarray(tensor.numpy()))
    if producer is None:
        return value.is_graph_input() and value.dtype is not None and value.dtype.is_floating_point()
    if depth == 0 or producer.domain != "":
        return False
    if producer.op_type == "ConstantOfShape":
        return _filling(producer) <= _LOW
    if producer.op_type == "Where":
        return any(_can_block(v, depth - 1) for v in producer.inputs[1:] if v is not None)
    if producer.op_type not in _SPREADS:
        return False
    operands = producer.inputs if producer.op_type not in MOVING | {"Slice", "Trilu"} else producer.inputs[:1]
    if producer.op_type == "Mul":  # what a caller gives is not low by itself: slopes of a bias, say
        operands = tuple(v for v in operands if v is not None and not v.is_graph_input())
    return any(_can_block(operand, depth - 1) for operand in operands if operand is not None)


def _holds_sentinel(array: np.ndarray) -> bool:
    if array.dtype.kind != "f" or not array.size:
        return False
    low = float(np.nanmin(array))
    return low <= _VERY_LOW or (low <= _LOW and not np.setdiff1d(array, [0.0, low]).size)


def _filling(node: ir.Node) -> float:
    attribute = node.attributes.get("value")
    return float(attribute.as_tensor().numpy().reshape(-1)[0]) if attribute is not None else 0.0


@dataclass(frozen=True)
class _Range:
    """All that ``key * k + query * q + c`` may be, with c between `low` and `high`, where k > q."""

    least: float
    most: float
    key: int = 0
    query: int = 0

    @property
    def low(self) -> float:
        if self.key != -self.query or self.key < 0:
            return -math.inf
        return self.least + self.key

    @property
    def high(self) -> float:
        if self.key != -self.query or self.key > 0:
            return math.inf
        return self.most + self.key

    @property
    def is_true(self) -> bool:
        return self.low > 0 or self.high < 0

    @property
    def is_false(self) -> bool:
        return self.low == self.high == 0


_UNKNOWN = _Range(-math.inf, math.inf)


class _Ahead:
    """Intervals of the elements of a value for which the key stands after the query."""

    def __init__(self, shapes: SymbolicShapes) -> None:
        self._shapes = shapes
        self._found: dict[tuple[ir.Value, int | None, int | None], _Range] = {}

    def of(self, value: ir.Value | None, key: int | None, query: int | None, depth: int) -> _Range:
        """Return the interval of `value`, of which axis `key` counts keys and axis `query` queries."""
        if value is None:
            return _UNKNOWN
        if (value, key, query) not in self._found:
            self._found[value, key, query] = self._of(value, key, query, depth)
        return self._found[value, key, query]

    def _of(self, value: ir.Value, key: int | None, query: int | None, depth: int) -> _Range:
        tensor, node = constant(value), value.producer()
        if tensor is not None:
            return _of_constant(np.asarray(tensor.numpy()), key, query)
        if node is None or depth == 0 or node.domain != "":
            return _UNKNOWN
        if node.op_type == "Range":
            return _Range(0, 0, int(key == 0), int(query == 0)) if 0 in (key, query) else _UNKNOWN
        if node.op_type == "ConstantOfShape":
            return _Range(_filling(node), _filling(node))
        if node.op_type == "Trilu":
            return self._triangle(node, key, query, depth)
        operands = self._operands(node, key, query, depth)
        function = _FUNCTIONS.get(node.op_type)
        return function(*operands) if function is not None and operands is not None else _UNKNOWN

    def _operands(self, node: ir.Node, key: int | None, query: int | None, depth: int) -> list[_Range] | None:
        count = 1 if node.op_type in MOVING | {"Slice"} else len(node.inputs)
        found = []
        for position in range(count):
            mapped = axis_map(node, self._shapes, position)
            if mapped is None:
                return None
            axes = [_single(mapped, axis) for axis in (key, query)]
            found.append(self.of(node.inputs[position], axes[0], axes[1], depth - 1))
        return found

    def _triangle(self, node: ir.Node, key: int | None, query: int | None, depth: int) -> _Range:
        rank = self._shapes.rank(node.inputs[0])
        diagonal = self._shapes.scalar(node.inputs[1]) if len(node.inputs) > 1 else 0.0
        inside = self.of(node.inputs[0], key, query, depth - 1)
        if rank is None or diagonal is None or (key, query) != (rank - 1, rank - 2):
            return _joined(inside, _Range(0, 0))
        if int_attribute(node, "upper", 1):
            return inside if diagonal <= 1 else _joined(inside, _Range(0, 0))
        return _Range(0, 0) if diagonal <= 0 else _joined(inside, _Range(0, 0))


def _single(mapped: AxisMap, axis: int | None) -> int | None:
    sources = mapped[axis] if axis is not None and axis < len(mapped) else ()
    return sources[0] if len(sources) == 1 else None


def _of_constant(array: np.ndarray, key: int | None, query: int | None) -> _Range:
    if array.dtype.kind not in "iufb" or not array.size:
        return _UNKNOWN
    numbers = array.astype(np.float64)
    if key is not None and query is not None and min(array.shape[key], array.shape[query]) > 1:
        matrix = np.moveaxis(numbers, (query, key), (-2, -1))
        rows, columns = np.triu_indices(matrix.shape[-2], 1, matrix.shape[-1])
        numbers = matrix[..., rows, columns]
    return _Range(float(numbers.min()), float(numbers.max())) if numbers.size else _UNKNOWN


def _joined(a: _Range, b: _Range) -> _Range:
    return _Range(min(a.low, b.low), max(a.high, b.high))


def _difference(a: _Range, b: _Range) -> _Range:
    return _Range(a.least - b.most, a.most - b.least, a.key - b.key, a.query - b.query)


def _sum(a: _Range, b: _Range) -> _Range:
    return _Range(a.least + b.least, a.most + b.most, a.key + b.key, a.query + b.query)


def _times(a: _Range, b: _Range) -> _Range:
    corners = [_finite_product(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
    return _Range(min(corners), max(corners))


def _finite_product(x: float, y: float) -> float:
    return 0.0 if 0 in (x, y) else x * y


def _truth(certain: bool, impossible: bool) -> _Range:
    return _Range(1, 1) if certain else _Range(0, 0) if impossible else _Range(0, 1)


def _compared(holds: Callable[[float, float], bool], *, upward: bool) -> Callable[[_Range, _Range], _Range]:
    """Return a comparison of the difference with 0; `upward` where larger differences make it hold."""

    def compare(a: _Range, b: _Range) -> _Range:
        gap = _difference(a, b)
        certain, possible = (gap.low, gap.high) if upward else (gap.high, gap.low)
        return _truth(holds(certain, 0), not holds(possible, 0))

    return compare


def _equal(a: _Range, b: _Range) -> _Range:
    gap = _difference(a, b)
    return _truth(gap.low == gap.high == 0, gap.low > 0 or gap.high < 0)


def _both(a: _Range, b: _Range) -> _Range:
    return _truth(a.is_true and b.is_true, a.is_false or b.is_false)


def _either(a: _Range, b: _Range) -> _Range:
    return _truth(a.is_true or b.is_true, a.is_false and b.is_false)


def _chosen(condition: _Range, yes: _Range, no: _Range) -> _Range:
    if condition.is_true:
        return yes
    return no if condition.is_false else _joined(yes, no)


def _absolute(a: _Range) -> _Range:
    low = 0.0 if a.low <= 0 <= a.high else min(abs(a.low), abs(a.high))
    return _Range(low, max(abs(a.low), abs(a.high)))


_FUNCTIONS: dict[str, Callable[..., _Range]] = {
    **dict.fromkeys(MOVING | {"Slice"}, lambda a: a),
    "Abs": _absolute,
    "Add": _sum,
    "And": _both,
    "BitwiseAnd": _both,
    "BitwiseOr": _either,
    "Equal": _equal,
    "Greater": _compared(operator.gt, upward=True),
    "GreaterOrEqual": _compared(operator.ge, upward=True),
    "Less": _compared(operator.lt, upward=False),
    "LessOrEqual": _compared(operator.le, upward=False),
    "Max": lambda a, b: _Range(max(a.low, b.low), max(a.high, b.high)),
    "Min": lambda a, b: _Range(min(a.low, b.low), min(a.high, b.high)),
    "Mul": _times,
    "Neg": lambda a: _Range(-a.most, -a.least, -a.key, -a.query),
    "Not": lambda a: _truth(a.is_false, a.is_true),
    "Or": _either,
    "Sub": _difference,
    "Where": _chosen,
}
