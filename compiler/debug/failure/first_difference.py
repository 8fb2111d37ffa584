# SPDX-License-Identifier: Apache-2.0
"""The first value, in order of execution, in which a model differs from what it was before a pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitfold.compiler.debug.failure.changes import Changes
from splitfold.compiler.debug.failure.tapping import tapped
from splitfold.compiler.verify import rtol
from splitfold.passes.provenance import anchors
from splitfold.passes.submodel import nodes_between
from splitfold.runtime.compare import exactness
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.target import Target

__all__ = ["Difference", "first_difference", "first_non_finite"]


@dataclass(frozen=True)
class Difference:
    """A value that is not what it was.

    Attributes:
        value: its name in the model after the pass.
        node: the node of that model that computes it.
        region: nodes, of the models before and after, between it and the equal matched values before it.
    """

    value: str
    node: ir.Node
    region: frozenset[ir.Node]

    def culprit(self, changes: Changes) -> ir.Node:
        """Return the node of the region that the pass changed, or else the one that computes the value."""
        return next((node for node in changes.all if node in self.region), self.node)


def first_difference(before: ir.Model, after: ir.Model, feeds: Feeds, target: Target) -> Difference | None:
    """Return the first value of `before` whose counterpart in `after` is not equal up to re-association.

    None where all are. The matched values that it is computed from are equal. Values that stand for nothing
    in the other model, such as a scaled input, are passed over.

    Raises:
        SessionError: one of the models does not run.
    """
    equal: list[tuple[str, str]] = []
    for reference, actual, x, y in _pairs(before, after, feeds, target):
        if exactness(x, y, rtol=rtol(x)).excess > 1:
            return _difference(before, after, (reference, actual), equal)
        equal.append((reference, actual))
    return None


def _pairs(
    before: ir.Model, after: ir.Model, feeds: Feeds, target: Target
) -> Iterator[tuple[str, str, Array, Array]]:
    matched = anchors(before, after)
    first = tapped(before, list(matched), feeds, target)
    second = tapped(after, list(matched.values()), feeds, target)
    for (reference, x), (actual, y) in zip(first, second, strict=True):
        yield reference, actual, x, y


def _difference(
    before: ir.Model, after: ir.Model, names: tuple[str, str], equal: list[tuple[str, str]]
) -> Difference:
    was, now = _values(before), _values(after)
    old, new = was[names[0]], now[names[1]]
    region = nodes_between([old], {was[name] for name, _ in equal})
    region |= nodes_between([new], {now[name] for _, name in equal})
    node = new.producer()
    assert node is not None  # anchors are computed values
    return Difference(names[1], node, frozenset(region))


def _values(model: ir.Model) -> dict[str, ir.Value]:
    return {value.name: value for node in model.graph for value in node.outputs if value.name}


def first_non_finite(
    before: ir.Model | None, after: ir.Model, feeds: Feeds, target: Target
) -> tuple[str, ir.Node] | None:
    """Return the first value of `after` that holds NaN or infinity, while its counterpart in `before` does
    not, and its node; or None.

    Raises:
        SessionError: one of the models does not run.
    """
    matched = {} if before is None else anchors(after, before)
    values = {name: value for name, value in _values(after).items() if _is_float(value)}
    for name, array in tapped(after, list(values), feeds, target):
        if np.isfinite(array.astype(np.float64)).all():
            continue
        if before is not None and name in matched and not _finite(before, matched[name], feeds, target):
            continue
        node = values[name].producer()
        if node is not None:
            return name, node
    return None


def _finite(model: ir.Model, name: str, feeds: Feeds, target: Target) -> bool:
    ((_, array),) = tapped(model, [name], feeds, target)
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()
