# SPDX-License-Identifier: Apache-2.0
"""From expected losses and costs to a plan: the best one within a budget, and the whole Pareto front."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitfold.passes.allocate import Front, Selection, pareto_front
from splitfold.passes.casts import choose_with_casts
from splitfold.passes.errors import BudgetError
from splitfold.passes.layer_cost import beside_bytes, weight_bytes_in, weight_count
from splitfold.passes.layers import Layer
from splitfold.passes.limits import Limit, Unit
from splitfold.passes.milp import choose_within
from splitfold.passes.piece_times import PieceTimes
from splitfold.passes.plan import PlannedLayer, PrecisionPlan
from splitfold.passes.precision import Precision
from splitfold.passes.signals.signal import ByChoice, Scores
from splitfold.passes.signals.subject import Subject
from splitfold.runtime.model_file import weight_bytes

__all__ = ["Allocation", "Tied"]


@dataclass(frozen=True, eq=False)
class Tied:
    """Layers that get one precision, as they share a weight; mostly just one.

    Attributes:
        layers: in the order of execution.
        choices: what all of them can have.
        kept: bytes of the float weight that stay under any choice, as something else reads it too.
    """

    layers: tuple[Layer, ...]
    choices: tuple[Precision, ...]
    kept: int

    def weight_bytes(self, precision: Precision) -> int:
        """Return the bytes of the shared weight."""
        return weight_bytes_in(self.layers[0], precision) + (0 if precision.is_float else self.kept)

    def bytes(self, precision: Precision) -> int:
        """Return the bytes of the weight, biases and grids."""
        return self.weight_bytes(precision) + sum(beside_bytes(layer, precision) for layer in self.layers)


@dataclass(frozen=True, eq=False)
class Allocation:
    """All that a budget is spent on.

    Attributes:
        subject: the layers and their choices.
        scores: of the signal.
        losses: expected loss by layer and choice.
        times: what the choices take, where a budget of time is to be kept.
    """

    subject: Subject
    scores: Scores
    losses: ByChoice
    times: PieceTimes | None = None

    @functools.cached_property
    def tied(self) -> tuple[Tied, ...]:
        """The layers by the weight that they read."""
        groups: dict[ir.Value, list[Layer]] = {}
        for layer in self.subject.layers:
            groups.setdefault(layer.weight, []).append(layer)
        return tuple(self._tied(weight, layers) for weight, layers in groups.items())

    def _tied(self, weight: ir.Value, layers: Sequence[Layer]) -> Tied:
        own = [self.subject.choices[layer.name] for layer in layers]
        choices = tuple(item for item in own[0] if all(item in other for other in own))
        nodes = {layer.node for layer in layers}
        elsewhere = weight.is_graph_output() or any(use.node not in nodes for use in weight.uses())
        kept = weight_bytes_in(layers[0], Precision.float()) if elsewhere else 0
        return Tied(tuple(layers), choices, kept)

    @functools.cached_property
    def front(self) -> Front:
        """All plans that no other beats in bytes and loss, from the smallest on."""
        return pareto_front(self._losses, self._costs(Unit.MEGABYTES))

    @functools.cached_property
    def time_front(self) -> Front:
        """All plans that no other beats in measured time and loss, from the fastest on; sizes are nanoseconds
        more than in float. What neighbours save one another is not in it.

        Raises:
            ValueError: no times were measured.
        """
        return pareto_front(self._losses, self._costs(Unit.MILLISECONDS))

    @functools.cached_property
    def rest_bytes(self) -> int:
        """Bytes of the model that no choice changes."""
        return weight_bytes(self.subject.model) - sum(item.bytes(Precision.float()) for item in self.tied)

    @functools.cached_property
    def _losses(self) -> list[list[float]]:
        return [
            [math.fsum(self.losses[layer.name][choice] for layer in item.layers) for choice in item.choices]
            for item in self.tied
        ]

    def _costs(self, unit: Unit) -> list[list[int]]:
        """Return what each choice costs in whole bytes, bits of codes, or nanoseconds."""
        return [[self._cost(unit, item, choice) for choice in item.choices] for item in self.tied]

    def _cost(self, unit: Unit, item: Tied, choice: Precision) -> int:
        if unit is Unit.BITS:
            return item.weight_bytes(choice)
        if unit is Unit.CODE_BITS:
            return weight_count(item.layers[0]) * choice.weight_bits
        if unit is Unit.MEGABYTES:
            return item.bytes(choice)
        if self.times is None:
            raise ValueError("a budget of time needs measured times.")
        return round(sum(self.times.more[layer.name][choice] for layer in item.layers) * 1e6)

    def _amount(self, limit: Limit) -> int:
        """Return the most that the costs may sum up to."""
        weights = sum(weight_count(item.layers[0]) for item in self.tied)
        if limit.unit is Unit.BITS:
            return math.floor(limit.amount * weights / 8)
        if limit.unit is Unit.CODE_BITS:
            return math.floor(limit.amount * weights)
        if limit.unit is Unit.MEGABYTES:
            return math.floor(limit.amount * 1e6) - self.rest_bytes
        return round((limit.amount - (self.times.float_ms if self.times else 0.0)) * 1e6)

    def _reached(self, unit: Unit, total: float) -> str:
        """Return a sum of costs in the words of its unit: the inverse of `_amount`."""
        weights = sum(weight_count(item.layers[0]) for item in self.tied)
        if unit is Unit.BITS:
            return f"{8 * total / weights:.4g} bits a weight"
        if unit is Unit.CODE_BITS:
            return f"{total / weights:.4g} bits a code"
        if unit is Unit.MEGABYTES:
            return f"{(total + self.rest_bytes) / 1e6:.6g} MB"
        return f"{total / 1e6 + (self.times.float_ms if self.times else 0.0):.4g} ms"

    def within(self, budget: Sequence[Limit]) -> PrecisionPlan:
        """Return the plan of least expected loss that keeps all limits.

        Raises:
            BudgetError: there is none; it says what comes nearest, and which limit binds.
            ValueError: no limit.
        """
        if not budget:
            raise ValueError("no budget was given.")
        if not self.tied:
            return PrecisionPlan((), self.scores.signal, tuple(map(str, budget)))
        costs = [self._costs(limit.unit) for limit in budget]
        amounts = [self._amount(limit) for limit in budget]
        alone = len(budget) == 1
        for limit, cost, amount in zip(budget, costs, amounts, strict=True):
            if not (alone and limit.unit is Unit.MILLISECONDS and self._pairs):  # neighbours save time
                self._check_reachable(limit, cost, amount)
        chosen: Sequence[int] | None
        if len(budget) == 1:
            front = self.front if budget[0].unit is Unit.MEGABYTES else pareto_front(self._losses, costs[0])
            selection = front.within(amounts[0])
            chosen = None if selection is None else selection.choices
            if budget[0].unit is Unit.MILLISECONDS:
                chosen = self._with_casts(costs[0], amounts[0], chosen)
        else:
            chosen = choose_within(self._losses, costs, amounts)
        if chosen is None:
            self._check_reachable(budget[0], costs[0], amounts[0])
            raise self._apart(budget, costs, amounts)
        return self._plan(chosen, budget)

    @functools.cached_property
    def _pairs(self) -> dict[tuple[int, int], int]:
        """Nanoseconds that two layers, by position in `tied`, save where both are in static int8, of those
        that can be only that or float."""
        sides = {Precision.float(), Precision.int8_static()}
        place = {
            item.layers[0].name: at
            for at, item in enumerate(self.tied)
            if len(item.layers) == 1 and set(item.choices) == sides
        }
        saved = self.times.saved if self.times is not None else {}
        return {
            (place[one], place[other]): round(ms * 1e6)
            for (one, other), ms in saved.items()
            if one in place and other in place
        }

    def _with_casts(
        self, times: Sequence[Sequence[int]], budget: int, chosen: Sequence[int] | None
    ) -> Sequence[int] | None:
        """Return the better of `chosen` and the choices that see what neighbours save."""
        sides = {
            at: (choices.index(Precision.float()), choices.index(Precision.int8_static()))
            for pair in self._pairs
            for at in pair
            if (choices := self.tied[at].choices)
        }
        other = choose_with_casts(self._losses, times, self._pairs, sides, budget) if sides else None
        found = [item for item in (chosen, other) if item is not None]
        return min(found, key=self._loss_of, default=None)

    def _loss_of(self, chosen: Sequence[int]) -> float:
        return math.fsum(row[at] for row, at in zip(self._losses, chosen, strict=True))

    def at(self, position: int) -> PrecisionPlan:
        """Return the plan at a position of the front."""
        return self.planned(self.front.selection(position))

    def planned(self, selection: Selection) -> PrecisionPlan:
        """Return the plan that takes these choices, such as a selection of a front."""
        return self._plan(selection.choices, ())

    def uniform(self, precision: Precision) -> PrecisionPlan:
        """Return the plan in which every layer that can have `precision` has it, the others their own largest
        choice."""
        chosen = [
            item.choices.index(precision)
            if precision in item.choices
            else max(range(len(item.choices)), key=lambda at, item=item: item.bytes(item.choices[at]))  # type: ignore[misc]
            for item in self.tied
        ]
        return self._plan(chosen, ())

    def _check_reachable(self, limit: Limit, cost: Sequence[Sequence[int]], amount: int) -> None:
        least = sum(
            min(size for size, loss in zip(sizes, losses, strict=True) if math.isfinite(loss))
            for sizes, losses in zip(cost, self._losses, strict=True)
        )
        if least <= amount:
            return
        bound = [item.layers[0].name for item in self.tied if len(item.choices) == 1]
        rest = (
            f" {self.rest_bytes / 1e6:.6g} MB of the model are in no layer of the plan."
            if limit.unit is Unit.MEGABYTES
            else ""
        )
        one = f" {len(bound)} layers have only one choice: {', '.join(bound[:5])}." if bound else ""
        reached = self._reached(limit.unit, least)
        raise BudgetError(
            f"no plan keeps the budget {limit}: with every layer in its cheapest choice it is {reached}."
            f"{rest}{one} Give smaller choices, or a larger budget.",
            reached=reached,
            binds=str(limit),
        )

    def _apart(
        self, budget: Sequence[Limit], costs: Sequence[list[list[int]]], amounts: Sequence[int]
    ) -> BudgetError:
        """Return the error for limits that can be kept one by one, but not together."""
        reached, binds = [], []
        for at, limit in enumerate(budget):
            others = [other for other in range(len(budget)) if other != at]
            best = choose_within(
                costs[at], [costs[other] for other in others], [amounts[other] for other in others]
            )
            if best is not None:
                least = sum(row[choice] for row, choice in zip(costs[at], best, strict=True))
                reached.append(f"keeping the others, {limit} is {self._reached(limit.unit, least)} at best")
                binds.append(str(limit))
        return BudgetError(
            f"no plan keeps {' and '.join(map(str, budget))} together, though each alone can be kept: "
            f"{'; '.join(reached) or 'nor do all but one of them'}.",
            reached="; ".join(reached),
            binds=", ".join(binds),
        )

    def _plan(self, chosen: Sequence[int], budget: Sequence[Limit]) -> PrecisionPlan:
        rows: dict[str, PlannedLayer] = {}
        stored = weights = 0
        for item, choice, losses in zip(self.tied, chosen, self._losses, strict=True):
            stored += item.weight_bytes(item.choices[choice])
            weights += weight_count(item.layers[0])
            for at, layer in enumerate(item.layers):
                rows[layer.name] = self._row(item, at, item.choices[choice], losses)
        layers = tuple(rows[layer.name] for layer in self.subject.layers)
        bits = 8 * stored / weights if weights else math.nan
        return PrecisionPlan(layers, self.scores.signal, tuple(map(str, budget)), bits)

    def _row(self, item: Tied, at: int, precision: Precision, losses: Sequence[float]) -> PlannedLayer:
        layer = item.layers[at]
        first = at == 0
        return PlannedLayer(
            layer.name,
            precision,
            weight_count(layer),
            (item.weight_bytes(precision) if first else 0) + beside_bytes(layer, precision),
            self.scores.by_layer[layer.name],
            self.losses[layer.name][precision],
            _why(item, precision, losses) if first else f"shares its weight with {item.layers[0].name}",
        )


def _why(item: Tied, precision: Precision, losses: Sequence[float]) -> str:
    """Return what the choices of next higher and next lower loss would have changed."""
    ranked = sorted(zip(losses, item.choices, strict=True), key=lambda pair: pair[0])
    at = next(position for position, (_, choice) in enumerate(ranked) if choice == precision)
    beside = [ranked[position] for position in (at + 1, at - 1) if 0 <= position < len(ranked)]
    own = item.bytes(precision)
    parts = [
        f"{choice}: {item.bytes(choice) - own:+,} bytes, loss {loss - ranked[at][0]:+.2g}"
        for loss, choice in beside
    ]
    return "; ".join(parts) or "its only choice"
