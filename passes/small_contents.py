# SPDX-License-Identifier: Apache-2.0
"""The elements of small tensors of rank 0 or 1 that a model computes from shapes and constants."""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as ir

from splitfold.passes.dims import Dim, Shape
from splitfold.passes.values import int_attribute

__all__ = ["SMALL", "Contents", "Item", "contents_of"]

SMALL = 16
"""Elements of the largest tensor that is followed."""
Item = Dim | float | bool | None
"""One element; None is unknown. An integer is a `Dim`, negative ones included."""
Contents = tuple[Item, ...]
_Contents = Callable[[ir.Value | None], Contents | None]
_Shapes = Callable[[ir.Value | None], Shape | None]


def contents_of(node: ir.Node, content: _Contents, shape: _Shapes) -> Contents | None:
    """Return the elements of the first output of `node`, or None.

    Args:
        node: an operator of the standard domain.
        content: gives the elements of a value.
        shape: gives the shape of a value.
    """
    if node.op_type == "Shape":
        return _of_shape(node, shape(node.inputs[0]))
    if node.op_type == "Size":
        return None
    if node.op_type == "ConstantOfShape":
        return _filled(node, content(node.inputs[0]))
    held = [content(value) for value in node.inputs]
    if not held or held[0] is None:
        return None
    if node.op_type in ("Squeeze", "Unsqueeze", "Reshape", "Identity", "Flatten"):
        return held[0] if _is_flat(node, shape) else None
    if node.op_type in _ONE:
        return tuple(map(_ONE[node.op_type], held[0]))
    known = [items for items in held if items is not None]
    if len(known) < len(held):
        return None
    if node.op_type == "Concat":
        joined = tuple(item for items in known for item in items)
        return joined if len(joined) <= SMALL else None
    if node.op_type == "Where":
        return _each(_where, known)
    if node.op_type in _TWO:
        return _each(_TWO[node.op_type], known)
    return _picked(node, known)


def _is_flat(node: ir.Node, shape: _Shapes) -> bool:
    """Whether the output has rank 0 or 1, so that its elements stay in a row."""
    if node.op_type == "Unsqueeze":
        return (shape(node.inputs[0]) or ()) == ()
    if node.op_type == "Reshape":
        target = shape(node.inputs[1])
        return target is not None and len(target) == 1 and target[0] in (Dim(0), Dim(1))
    return node.op_type != "Flatten"


def _of_shape(node: ir.Node, shape: Shape | None) -> Contents | None:
    if shape is None:
        return None
    end = node.attributes.get("end")
    return tuple(shape[int_attribute(node, "start", 0) : end.as_int() if end is not None else None])


def _filled(node: ir.Node, target: Contents | None) -> Contents | None:
    if target is None or len(target) > 1 or any(not isinstance(item, Dim) for item in target):
        return None
    size = target[0].known if target and isinstance(target[0], Dim) else 1
    if size is None or size > SMALL:
        return None
    attribute = node.attributes.get("value")
    element = attribute.as_tensor().numpy().reshape(-1)[0].item() if attribute is not None else 0.0
    item = Dim(element) if isinstance(element, int) and not isinstance(element, bool) else element
    return (item,) * size


def _picked(node: ir.Node, held: list[Contents]) -> Contents | None:
    """Return what a Gather or Slice of a row takes."""
    data, *rest = held
    indices = [[item.known for item in items if isinstance(item, Dim)] for items in rest]
    if any(None in row for row in indices):
        return None
    rows = [[index for index in row if index is not None] for row in indices]
    if node.op_type == "Gather" and len(rows) == 1:
        return tuple(data[index] for index in rows[0] if -len(data) <= index < len(data))
    if node.op_type == "Slice" and len(rows) >= 2 and len(rows[0]) == len(rows[1]) == 1:
        step = rows[3][0] if len(rows) > 3 else 1
        return data[rows[0][0] : rows[1][0] : step]
    return None


def _each(function: Callable[..., Item], held: list[Contents]) -> Contents | None:
    length = max(map(len, held))
    if any(len(items) not in (1, length) for items in held):
        return None
    rows = [items * length if len(items) == 1 else items for items in held]
    return tuple(function(*items) for items in zip(*rows, strict=True))


def _where(condition: Item, yes: Item, no: Item) -> Item:
    return None if not isinstance(condition, bool) else (yes if condition else no)


def _equal(a: Item, b: Item) -> Item:
    if a is None or b is None:
        return None
    if isinstance(a, Dim) and isinstance(b, Dim) and a != b:
        # a size is never negative, whatever its symbols stand for
        impossible = any(x.symbols and y.known is not None and y.known < 0 for x, y in ((a, b), (b, a)))
        return False if impossible or (a.known is not None and b.known is not None) else None
    return a == b


def _number(item: Item) -> float | None:
    if isinstance(item, Dim):
        return None if item.known is None else float(item.known)
    return None if item is None else float(item)


def _multiplied(a: Item, b: Item) -> Item:
    if isinstance(a, Dim) and isinstance(b, Dim):
        return a * b
    x, y = _number(a), _number(b)
    return None if x is None or y is None else x * y


def _divided(a: Item, b: Item) -> Item:
    if isinstance(a, Dim) and isinstance(b, Dim):
        if a.known is not None and b.known:
            return Dim(int(a.known / b.known))
        return a.over(b)
    x, y = _number(a), _number(b)
    return None if x is None or not y else x / y


def _added(a: Item, b: Item, sign: int = 1) -> Item:
    if isinstance(a, Dim) and isinstance(b, Dim):
        if a.symbols == b.symbols:
            return Dim(a.factor + sign * b.factor, a.symbols)
        if Dim(0) in (a, b):
            return a if b == Dim(0) else Dim(sign * b.factor, b.symbols)
        return Dim(1, (f"({a}{'+' if sign > 0 else '-'}{b})",))
    x, y = _number(a), _number(b)
    return None if x is None or y is None else x + sign * y


def _power(a: Item, b: Item) -> Item:
    x, y = _number(a), _number(b)
    return None if x is None or y is None or x < 0 else float(x**y)


def _root(a: Item) -> Item:
    x = _number(a)
    return None if x is None or x < 0 else math.sqrt(x)


def _inverse(a: Item) -> Item:
    x = _number(a)
    return None if not x else 1.0 / x


def _negative(a: Item) -> Item:
    if isinstance(a, Dim):
        return Dim(-a.factor, a.symbols)
    return None if a is None else -a


_ONE: dict[str, Callable[[Item], Item]] = {
    "Cast": lambda item: item,
    "Floor": lambda item: item,
    "Neg": _negative,
    "Reciprocal": _inverse,
    "Sqrt": _root,
}
_TWO: dict[str, Callable[[Item, Item], Item]] = {
    "Add": _added,
    "Div": _divided,
    "Equal": _equal,
    "Mul": _multiplied,
    "Pow": _power,
    "Sub": lambda a, b: _added(a, b, -1),
}
