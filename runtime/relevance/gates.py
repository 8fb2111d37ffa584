# SPDX-License-Identifier: Apache-2.0
"""Which factor of a product only gates or scales the other: functions and norms written in single operators.

x * sigmoid(x), 0.5 x * (1 + erf(x / sqrt 2)), x * 1 / sqrt(mean(x^2) + eps): the second factor is a function,
not a linear one, of what the first one is made from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from splitfold.runtime.relevance.operators import Kind, kind_of

__all__ = ["centred", "gate"]

Node = Any
"""A node of a lifted graph."""

_REDUCED = frozenset({"ReduceMean", "ReduceSum", "ReduceL2", "ReduceL1", "ReduceMax", "ReduceSumSquare"})
_MOVED = frozenset({"Cast", "Expand", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_LOCAL = (Kind.PRODUCT, Kind.QUOTIENT, Kind.SUM, Kind.ELEMENTWISE)


class _Chain:
    """The nodes that one is computed from by elementwise operators and reductions.

    Args:
        start: of the lifted graph.
        operator: returns the ONNX operator of a node.
        active: whether a node gives an activation.
        linear: stop at what is not linear.
    """

    def __init__(
        self, start: Node, operator: Callable[[Node], str], active: Callable[[Node], bool], *, linear: bool
    ) -> None:
        self._operator, self._active, self._linear = operator, active, linear
        self.seen = {start}
        pending = [start]
        while pending:
            for other in self.inner(pending.pop()):
                if other not in self.seen:
                    self.seen.add(other)
                    pending.append(other)

    def inner(self, node: Node) -> list[Node]:
        inputs = [other for other in node.all_input_nodes if self._active(other)]
        name = self._operator(node)
        kind = kind_of(name)
        if name not in _REDUCED | _MOVED and kind not in _LOCAL:
            return []
        curved = kind is Kind.ELEMENTWISE or (kind in (Kind.PRODUCT, Kind.QUOTIENT) and len(inputs) > 1)
        return [] if self._linear and curved else inputs


def gate(
    first: Node, second: Node, operator: Callable[[Node], str], active: Callable[[Node], bool]
) -> int | None:
    """Return which of two factors (0 or 1) is a function of the other one's source, not a linear one; or
    None."""
    for at, (kept, factor) in enumerate(((first, second), (second, first))):
        if kept is not factor and _is_function(kept, factor, operator, active):
            return 1 - at
    return None


def _is_function(
    kept: Node, factor: Node, operator: Callable[[Node], str], active: Callable[[Node], bool]
) -> bool:
    source = _Chain(kept, operator, active, linear=True).seen
    if factor in source:
        return False
    whole, curved = _Chain(factor, operator, active, linear=False), False
    linear = _Chain(factor, operator, active, linear=True).seen
    pending, seen = [factor], {factor}
    while pending:
        node = pending.pop()
        if node in source:
            curved |= node not in linear
            continue
        inner = whole.inner(node)
        if not inner:
            return False
        for other in inner:
            if other not in seen:
                seen.add(other)
                pending.append(other)
    return curved


def centred(kept: Node, mean: Node, operator: Callable[[Node], str], active: Callable[[Node], bool]) -> bool:
    """Whether `mean` is a mean of `kept`, but for steps that only move numbers."""
    while operator(mean) in _MOVED:
        (mean,) = (other for other in mean.all_input_nodes if active(other))
    return operator(mean) == "ReduceMean" and kept in mean.all_input_nodes
