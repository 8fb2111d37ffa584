# SPDX-License-Identifier: Apache-2.0
"""Stopwatches that need no clock: times follow from what stands in the graph, so that no test depends on the
machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from splitfold.compiler.speed.stopwatch import LayerTime
from splitfold.passes.identity import layers_of, name_layers
from splitfold.runtime.feeds import Feeds
from splitfold.runtime.race import Race, race_of
from splitfold.runtime.target import Target


@dataclass(frozen=True)
class Even:
    """All models take the same."""

    def race(
        self, before: ir.Model, after: ir.Model, feeds: Feeds, *, seconds: float, target: Target
    ) -> Race:
        return race_of([1.0] * 6, [1.0] * 6)

    def layers(
        self, before: ir.Model, after: ir.Model, feeds: Feeds, *, target: Target
    ) -> tuple[LayerTime, ...]:
        return ()


@dataclass(frozen=True)
class Priced:
    """A node takes the milliseconds of its operator type, or of its layer and type: ``up/MatMul``."""

    prices: Mapping[str, float]
    asked: list[str] = field(default_factory=list)
    """What was timed, in order."""

    def race(
        self, before: ir.Model, after: ir.Model, feeds: Feeds, *, seconds: float, target: Target
    ) -> Race:
        self.asked.append(f"race {seconds:g}")
        one, other = (sum(self._layers(model).values()) for model in (before, after))
        return race_of([one] * 8, [other] * 8)

    def layers(
        self, before: ir.Model, after: ir.Model, feeds: Feeds, *, target: Target
    ) -> tuple[LayerTime, ...]:
        self.asked.append("layers")
        one, other = self._layers(before), self._layers(after)
        return tuple(
            LayerTime((name,), one.get(name, 0.0) * 1e3, other.get(name, 0.0) * 1e3)
            for name in dict.fromkeys((*one, *other))
        )

    def _layers(self, model: ir.Model) -> dict[str, float]:
        copy = model.clone()
        name_layers(copy)
        found: dict[str, float] = {}
        for node in copy.graph:
            name = "+".join(layers_of(node))
            price = self.prices.get(f"{name}/{node.op_type}", self.prices.get(node.op_type, 0.0))
            found[name] = found.get(name, 0.0) + price
        return found
