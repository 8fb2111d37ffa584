# SPDX-License-Identifier: Apache-2.0
"""Sizes of axes as products of a number and symbols, so that a Reshape of unknown batch and length can still
be solved."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

__all__ = ["ONE", "Dim", "Shape", "declare_shape", "declared_shape", "group_axes", "product"]

_PRODUCT = re.compile(r"^(?:(\d+)\*)?([A-Za-z_]\w*(?:\*[A-Za-z_]\w*)*)$")


@dataclass(frozen=True)
class Dim:
    """``factor * symbols[0] * symbols[1] ...``; without symbols it is a known size."""

    factor: int
    symbols: tuple[str, ...] = ()

    @property
    def known(self) -> int | None:
        """The size, or None where it depends on the call."""
        return None if self.symbols else self.factor

    def __mul__(self, other: Dim) -> Dim:
        return Dim(self.factor * other.factor, tuple(sorted((*self.symbols, *other.symbols))))

    def over(self, other: Dim) -> Dim | None:
        """Return the exact quotient, or None."""
        mine, its = Counter(self.symbols), Counter(other.symbols)
        if other.factor == 0 or self.factor % other.factor or its - mine:
            return None
        return Dim(self.factor // other.factor, tuple(sorted((mine - its).elements())))

    def __str__(self) -> str:
        parts = [str(self.factor)] if self.factor != 1 or not self.symbols else []
        return "*".join([*parts, *self.symbols])


ONE = Dim(1)
Shape = tuple[Dim | None, ...]
"""Of a value whose rank is known; None is a size of which nothing is known."""


def product(dims: Iterable[Dim | None]) -> Dim | None:
    """Return the product, or None where a factor is unknown."""
    total = ONE
    for dim in dims:
        if dim is None:
            return None
        total = total * dim
    return total


def declared_shape(value: ir.Value) -> Shape | None:
    """Return the shape that the model declares for `value`, or None where not even the rank is known."""
    if value.shape is None:
        return None
    return tuple(_declared(dim if isinstance(dim, int) else dim.value) for dim in value.shape)


def declare_shape(value: ir.Value, shape: Shape) -> None:
    """Let the model declare `shape` for `value`."""
    value.shape = ir.Shape([None if dim is None else dim.known or str(dim) for dim in shape])


def _declared(dim: int | str | None) -> Dim | None:
    if dim is None or isinstance(dim, int):
        return None if dim is None else Dim(dim)
    match = _PRODUCT.match(dim)
    if match is None:
        return Dim(1, (dim,))
    return Dim(int(match[1] or 1), tuple(sorted(match[2].split("*"))))


def group_axes(before: Sequence[Dim | None], after: Sequence[Dim | None]) -> list[tuple[range, range]] | None:
    """Return which axes of `before` a Reshape turns into which of `after`: the smallest groups of neighbours
    with equal products, in order; None where the sizes do not say.

    Axes of size 1 join the group to their left.
    """
    if any(dim is None for dim in (*before, *after)):
        return None
    groups: list[tuple[range, range]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        start_i, start_j = i, j
        i, j = min(i + 1, len(before)), min(j + 1, len(after))
        while (left := product(before[start_i:i])) != (right := product(after[start_j:j])):
            if left is None or right is None:
                return None
            if j < len(after) and (i == len(before) or _wants_more(left, right)):
                j += 1
            elif i < len(before):
                i += 1
            else:
                return None
        while i < len(before) and before[i] == ONE and not (j < len(after) and after[j] == ONE):
            i += 1
        while j < len(after) and after[j] == ONE and not (i < len(before) and before[i] == ONE):
            j += 1
        groups.append((range(start_i, i), range(start_j, j)))
    return groups


def _wants_more(left: Dim, right: Dim) -> bool:
    """Whether the right side has to grow to become the left: it divides the left, or is smaller."""
    if left.over(right) is not None:
        return True
    if right.over(left) is not None:
        return False
    return (len(right.symbols), math.prod((right.factor,))) < (len(left.symbols), left.factor)
