# SPDX-License-Identifier: Apache-2.0
"""How the initializers of two models differ: by name, and by the operator that computes with them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from splitfold.compiler.debug.diff.branch_weights import whole_weight
from splitfold.compiler.debug.diff.held import Held, Role, held_by
from splitfold.compiler.debug.diff.match import Counterparts, Side, doubtful, operator_of, pattern
from splitfold.compiler.debug.diff.types import Kind, Moved, Rescaled, TensorChange, TensorFacts
from splitfold.passes.text import render_dtype
from splitfold.runtime.digest import tensor_digest
from splitfold.runtime.feeds import Array

__all__ = ["TensorDiff", "compare_tensors"]

_SHOWN = 4
_CHUNK = 1 << 17
"""Elements that are compared at a time."""
_GAIN = 6.0
"""dB that factors by channel must explain for a weight to be called rescaled."""
_LIKENESS = 10.0
"""dB to which a rescaled weight must fit its original."""


@dataclass
class TensorDiff:
    """Changes of initializers, each with the node whose layer it belongs to (None: nobody reads it)."""

    changes: list[tuple[ir.Node | None, TensorChange]] = field(default_factory=list)
    renamed: int = 0


def compare_tensors(before: Side, after: Side, pairs: Sequence[Counterparts]) -> TensorDiff:
    """Return how the initializers differ: those that counterparts compute with, in the same role; then those
    of equal names, then those of equal content."""
    found = _Comparison(before, after)
    for pair in pairs:
        found.by_role(pair)
    found.by_name()
    found.by_content()
    found.leftovers()
    return TensorDiff(found.changes, found.renamed)


class _Comparison:
    def __init__(self, before: Side, after: Side) -> None:
        self._sides = (before, after)
        self.before, self.after = _initializers(before.model), _initializers(after.model)
        self.changes: list[tuple[ir.Node | None, TensorChange]] = []
        self.renamed = 0
        both = self.before.keys() & self.after.keys()
        chance = doubtful((name, _shape(self.before[name]), _shape(self.after[name])) for name in both)
        self._both = {name for name in both if pattern(name) not in chance}
        """Names that both models have, and not by chance."""

    def _drop(self, before: Sequence[ir.Value], after: Sequence[ir.Value]) -> None:
        for value in before:
            self.before.pop(value.name or "", None)
        for value in after:
            self.after.pop(value.name or "", None)

    def by_role(self, pair: Counterparts) -> None:
        """Compare what two counterparts compute with, where one of both is a difference."""
        fused = len(pair.before) + len(pair.after) > 2
        both = zip((pair.before, pair.after), self._sides, strict=True)
        first, second = (_held(nodes, side, fused) for nodes, side in both)
        alike = operator_of(pair.before[0]) == operator_of(pair.after[0])
        for role, was in first.items():
            now = second.get(role)
            if now is None or not (alike or isinstance(role, Role)):
                continue
            if was.value.name not in self.before and now.value.name not in self.after:
                continue  # it was compared at another reader
            text = role.value if isinstance(role, Role) else ""
            change = _compare(was, now, text)
            if change is not None:
                self.changes.append((pair.after[-1], change))
            elif was.value.name != now.value.name:
                self.renamed += 1
            kept = self._both - {was.value.name} if was.value.name == now.value.name else self._both
            self._drop(_unless(kept, was), _unless(kept, now))

    def by_name(self) -> None:
        """Compare initializers of equal names."""
        for name in [name for name in self.before if name in self.after and name in self._both]:
            was, now = self.before[name], self.after[name]
            change = _compare(_whole(was), _whole(now), "")
            if change is not None:
                self.changes.append((_reader(now), change))
            self._drop([was], [now])

    def by_content(self) -> None:
        """Count those that have another name only."""
        same: defaultdict[str, list[ir.Value]] = defaultdict(list)
        for value in self.after.values():
            same[tensor_digest(value.const_value)].append(value)
        for value in list(self.before.values()):
            if others := same.get(tensor_digest(value.const_value)):
                self._drop([value], [others.pop(0)])
                self.renamed += 1

    def leftovers(self) -> None:
        """Record those that only one model has."""
        for value in self.before.values():
            self.changes.append((_reader(value), TensorChange(Kind.REMOVED, before=_facts(_whole(value)))))
        for value in self.after.values():
            self.changes.append((_reader(value), TensorChange(Kind.ADDED, after=_facts(_whole(value)))))


def _unless(kept: set[str], held: Held) -> list[ir.Value]:
    """Return the initializers of a constant, but for those that another reader may still hold."""
    return [value for value in (held.value, *held.parts) if value.name not in kept]


def _initializers(model: ir.Model) -> dict[str, ir.Value]:
    return {
        name: value
        for graph in model.graphs()
        for name, value in graph.initializers.items()
        if value.const_value is not None
    }


def _held(nodes: Sequence[ir.Node], side: Side, fused: bool) -> dict[Role | int, Held]:
    found: dict[Role | int, Held] = {}
    for node in nodes:
        found = {**held_by(node, fused=fused), **found}
    whole = whole_weight(nodes, side) if Role.WEIGHT in found else None
    return found if whole is None else {**found, Role.WEIGHT: whole}


def _whole(value: ir.Value) -> Held:
    """Return an initializer as it is stored."""

    def numbers() -> Array:
        return np.asarray(value.const_value.numpy()) if value.const_value is not None else np.empty(0)

    return Held(value, (), numbers)


def _shape(value: ir.Value) -> str:
    return "" if value.const_value is None else str(value.const_value.shape)


def _reader(value: ir.Value) -> ir.Node | None:
    return next((use.node for use in value.uses()), None)


def _facts(held: Held) -> TensorFacts:
    tensor = held.value.const_value
    if tensor is None:
        raise ValueError(f"'{held.value.name}' is not constant")
    return TensorFacts(
        held.value.name or "",
        render_dtype(tensor.dtype),
        tuple(int(size) for size in tensor.shape.numpy()),
        tensor.nbytes,
        tuple(part.name or "" for part in held.parts),
        held.form,
    )


def _compare(was: Held, now: Held, role: str) -> TensorChange | None:
    """Return the change from one constant to the other, or None where they are equal."""
    first, second = _facts(was), _facts(now)
    kind = Kind.CHANGED
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        kind = Kind.RETYPED
    elif not was.parts and not now.parts and _equal(was, now):
        return None
    moved, note = _moved(was, now)
    if kind is Kind.CHANGED and moved is not None and moved.max_abs == 0:
        return None  # the same numbers from the same kind of codes
    return TensorChange(kind, role, first, second, moved, note)


def _equal(was: Held, now: Held) -> bool:
    first, second = was.value.const_value, now.value.const_value
    return first is second or tensor_digest(first) == tensor_digest(second)


def _moved(was: Held, now: Held) -> tuple[Moved | None, str]:
    try:
        first, second = (held.numbers() for held in (was, now))
    except (ValueError, IndexError, ZeroDivisionError) as error:
        return None, f"not comparable: {error}"
    if first.shape != second.shape:
        return None, f"not comparable: {list(first.shape)} and {list(second.shape)}"
    if not all(_is_numeric(array) for array in (first, second)):
        return None, "not comparable: no numbers"
    if all(array.dtype.kind in "iub" and array.size <= _SHOWN for array in (first, second)):
        return None, f"{_list(first)} -> {_list(second)}"
    return _measure(first, second, now.channels), ""


def _is_numeric(array: Array) -> bool:
    try:
        array[:0].astype(np.float64) if array.ndim else array.astype(np.float64)
    except (TypeError, ValueError):
        return False
    return array.dtype.kind not in "OUS"


def _list(array: Array) -> str:
    return str(array.tolist()).replace(" ", "")


def _measure(first: Array, second: Array, channels: tuple[int, int]) -> Moved:
    plain = _distance(first, second)
    best, reach = plain, max(plain.sqnr_db + _GAIN, _LIKENESS)
    for name, axis in zip(("input", "output"), channels, strict=True):
        if axis < 0 or first.ndim < 2 or not math.isfinite(plain.sqnr_db):
            continue
        factors = _factors(first, second, axis)
        rescaled = Rescaled(name, float(factors.min()), float(factors.max()))
        found = _distance(first, second, factors, rescaled)
        if found.sqnr_db >= reach:
            best, reach = found, found.sqnr_db + _GAIN
    return best


def _rows(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Yield the arrays in float64, some of their first axis at a time: large ones are not copied whole."""
    whole = [np.atleast_1d(array) for array in arrays]
    count = max(len(array) for array in whole)
    step = max(1, _CHUNK * count // max(whole[0].size, 1))
    for start in range(0, count, step):
        part = slice(start, start + step)
        yield tuple((array if len(array) < count else array[part]).astype(np.float64) for array in whole)


def _distance(
    first: Array, second: Array, factors: Array | None = None, rescaled: Rescaled | None = None
) -> Moved:
    largest = noise = signal = 0.0
    for was, now, factor in _rows(first, second, np.ones(1) if factors is None else factors):
        was *= factor
        with np.errstate(invalid="ignore"):  # equal infinities are no distance, and neither are two NaN
            gap = np.where((was == now) | (np.isnan(was) & np.isnan(now)), 0.0, now - was)
        largest = float(np.maximum(largest, np.abs(gap).max(initial=0.0)))
        noise += float(np.square(gap).sum())
        signal += float(np.square(was, where=np.isfinite(was), out=np.zeros_like(was)).sum())
    relative = math.sqrt(noise / signal) if signal else (0.0 if noise == 0 else math.inf)
    level = (
        -20 * math.log10(relative) if 0 < relative < math.inf else math.inf if relative == 0 else -math.inf
    )
    return Moved(largest, relative, level, rescaled)


def _factors(first: Array, second: Array, axis: int) -> Array:
    """Return the factors, one a channel, that bring the first nearest to the second; they broadcast to it."""
    along = axis % first.ndim
    rest = tuple(at for at in range(first.ndim) if at != along)
    sums = [(np.square(was).sum(rest), (was * now).sum(rest)) for was, now in _rows(first, second)]
    join = np.concatenate if along == 0 else sum
    power, product = (np.asarray(join([pair[at] for pair in sums])) for at in (0, 1))
    factors = np.divide(product, power, out=np.ones_like(power), where=power > 0)
    return np.reshape(factors, [-1 if at == along else 1 for at in range(first.ndim)])
