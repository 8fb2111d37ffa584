# SPDX-License-Identifier: Apache-2.0
"""What changed at one node whose operator is the same: attributes, output types, inputs."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from splitfold.compiler.debug.diff.match import Counterparts, Side, key_of
from splitfold.compiler.debug.diff.types import Aspect, Detail
from splitfold.passes.submodel import read_values
from splitfold.passes.text import render_attribute, render_type
from splitfold.runtime.digest import tensor_digest

__all__ = ["Wiring", "details"]

_COMMUTATIVE = {
    "Add",
    "And",
    "BitwiseAnd",
    "BitwiseOr",
    "Equal",
    "Max",
    "Mean",
    "Min",
    "Mul",
    "Or",
    "Sum",
    "Xor",
}


class Wiring:
    """Tells whether two values, one of each model, come from the same place but for nodes that only one
    model has."""

    def __init__(self, before: Side, after: Side, pairs: Sequence[Counterparts]) -> None:
        self._before, self._after = before, after
        self._paired = {
            node: number
            for number, pair in enumerate(pairs)
            for node in (pair.before[-1], pair.after[-1])  # the ends, whose outputs are the same
        }
        self._known: dict[ir.Value, frozenset[Hashable]] = {}

    def sources(self, value: ir.Value, other: Side) -> frozenset[Hashable]:
        """Return marks of the nearest values that `value` is made from and the other model has too; empty for
        what is made from constants alone."""
        pending, seen, found = [value], {value}, set[Hashable]()
        while pending:
            at = pending.pop()
            marks = self._marks(at, other)
            found |= marks
            maker = at.producer()
            if not marks and maker is not None:
                fresh = [read for read in read_values(maker) if read not in seen]
                seen.update(fresh)
                pending += fresh
        return frozenset(found)

    def _marks(self, value: ir.Value, other: Side) -> set[Hashable]:
        maker = value.producer()
        if maker is None:
            return set() if value.is_initializer() else {("input", value.name)}
        marks: set[Hashable] = {key} if (key := key_of(value)) in other.by_key else set()
        if maker in self._paired:
            marks.add((self._paired[maker], value.index()))
        return marks

    def differ(self, before: ir.Value | None, after: ir.Value | None) -> bool:
        """Return whether two inputs come from different places."""
        if before is None or after is None:
            return before is not after
        if before.name == after.name and before.is_initializer() != after.is_initializer():
            return False  # the value was folded to a constant, or the other way round
        first, second = self._of(before, self._after), self._of(after, self._before)
        return bool(first or second) and not first & second

    def _of(self, value: ir.Value, other: Side) -> frozenset[Hashable]:
        if value not in self._known:
            self._known[value] = self.sources(value, other)
        return self._known[value]


def details(before: ir.Node, after: ir.Node, wiring: Wiring) -> tuple[Detail, ...]:
    """Return what changed from one node to the other, which have the same operator."""
    return (*_attributes(before, after), *_types(before, after), *_inputs(before, after, wiring))


def _attributes(before: ir.Node, after: ir.Node) -> Iterator[Detail]:
    for name in sorted({*before.attributes, *after.attributes}):
        first, second = before.attributes.get(name), after.attributes.get(name)
        first, second = first or _default(before, name), second or _default(after, name)
        if first is not None and second is not None and _same(first, second):
            continue
        was, now = (_text(attribute) for attribute in (first, second))
        yield Detail(Aspect.ATTRIBUTE, name, was, f"{now} of other content" if was == now else now)


def _default(node: ir.Node, name: str) -> ir.Attr | None:
    """Return what ONNX takes for an attribute that is not there."""
    if not onnx.defs.has(node.op_type, node.domain):
        return None
    known = onnx.defs.get_schema(node.op_type, domain=node.domain).attributes.get(name)
    given = known is not None and known.default_value.type != onnx.AttributeProto.UNDEFINED
    return ir.serde.deserialize_attribute(known.default_value) if known is not None and given else None


def _text(attribute: ir.Attr | None) -> str:
    if attribute is not None and attribute.type is ir.AttributeType.FLOAT and not attribute.is_ref():
        return repr(attribute.as_float())
    return "" if attribute is None else render_attribute(attribute)


def _same(first: ir.Attr, second: ir.Attr) -> bool:
    if first.type is not second.type or first.is_ref() or second.is_ref():
        return first.type is second.type and first.ref_attr_name == second.ref_attr_name
    if first.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return True  # their nodes are compared like all others
    if first.type is ir.AttributeType.TENSOR:
        return tensor_digest(first.as_tensor()) == tensor_digest(second.as_tensor())
    if first.type is ir.AttributeType.FLOAT:
        return bool(np.float32(first.as_float()) == np.float32(second.as_float()))
    if first.type is ir.AttributeType.FLOATS:
        was, now = (np.asarray(attribute.as_floats(), np.float32) for attribute in (first, second))
        return np.array_equal(was, now)
    return bool(first.value == second.value)


def _types(before: ir.Node, after: ir.Node) -> Iterator[Detail]:
    for first, second in zip(before.outputs, after.outputs, strict=False):
        if _contradict(first, second):
            yield Detail(
                Aspect.OUTPUT_TYPE, second.name or first.name or "", render_type(first), render_type(second)
            )


def _contradict(first: ir.Value, second: ir.Value) -> bool:
    """Return whether two types differ in what is known of both: a shape known better is no change."""
    if first.dtype is not None and second.dtype is not None and first.dtype is not second.dtype:
        return True
    if first.shape is None or second.shape is None:
        return False
    if len(first.shape) != len(second.shape):
        return True
    return any(
        isinstance(x, int) and isinstance(y, int) and x != y
        for x, y in zip(first.shape, second.shape, strict=True)
    )


def _inputs(before: ir.Node, after: ir.Node, wiring: Wiring) -> Iterator[Detail]:
    count = max(len(before.inputs), len(after.inputs))
    first, second = ([*node.inputs, *([None] * (count - len(node.inputs)))] for node in (before, after))
    if before.op_type in _COMMUTATIVE and count == 2 and not any(map(wiring.differ, first, reversed(second))):
        return
    for position, (was, now) in enumerate(zip(first, second, strict=True)):
        if wiring.differ(was, now):
            yield Detail(Aspect.INPUT, str(position), _name(was), _name(now))


def _name(value: ir.Value | None) -> str:
    return "" if value is None else value.name or ""
