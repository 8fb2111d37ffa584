# SPDX-License-Identifier: Apache-2.0
"""Where conversions between float and static int8 go, among convolutions that feed each other.

A linear layer in static int8 quantizes its own input and gives float, whatever its neighbours are in: nothing
can be saved between two of them. A convolution gives codes as well, and two neighbours in int8 (with what has
integer kernels between them) need no conversion: then each choice costs what its neighbours make of it, and a
knapsack does not see that. A minimum cut does, for two precisions at one exchange rate of loss against time;
the rate is searched for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitfold.passes.digraph import minimum_cut
from splitfold.passes.layers import Layer, LayerKind
from splitfold.passes.regions import output_point, region_values

__all__ = ["cheapest_with_casts", "choose_with_casts", "neighbours"]

_ROUNDS = 60
"""Halvings of the exchange rate."""


def neighbours(model: ir.Model, layers: Sequence[Layer]) -> dict[tuple[int, int], ir.Value]:
    """Return the pairs of convolutions, by position in `layers`, between which codes need no conversion where
    both are static int8, each with the value that the second one reads."""
    convolutions = {layer.node: at for at, layer in enumerate(layers) if layer.kind is LayerKind.CONV}
    own = [layers[at] for at in convolutions.values()]
    region = region_values(model.graph, own, list(convolutions), lambda _: True)
    starts = {output_point(layer): convolutions[layer.node] for layer in own}
    return {
        (start, at): layers[at].input
        for at in convolutions.values()
        for start in sorted(_sources(layers[at].input, region, starts))
    }


def _sources(
    value: ir.Value, region: Mapping[ir.Value, ir.Value], starts: Mapping[ir.Value, int]
) -> set[int]:
    """Return the convolutions from which integer operators alone lead to `value`."""
    found, pending, seen = set(), [value], set()
    while pending:
        here = pending.pop()
        if here in seen or here not in region:
            continue
        seen.add(here)
        if here in starts:
            found.add(starts[here])
            continue
        node = here.producer()
        while (
            node is not None and node.outputs[0] not in region and len(node.inputs) == 1
        ):  # an absorbed Relu
            node = node.inputs[0].producer() if node.inputs[0] is not None else None
        pending += [item for item in (node.inputs if node is not None else ()) if item is not None]
    return found


def choose_with_casts(
    losses: Sequence[Sequence[float]],
    times: Sequence[Sequence[float]],
    pairs: Mapping[tuple[int, int], float],
    sides: Mapping[int, tuple[int, int]],
    budget: float,
) -> tuple[int, ...] | None:
    """Return choices of little loss whose times, what neighbours save taken off, keep `budget`; None where
    none was found.

    At each exchange rate the sum of loss and time is minimised exactly, so that the choices lie on the lower
    convex hull of all that are possible: between two points of the hull there may be better ones.

    Args:
        losses, times: by layer and choice.
        pairs: by two layers, the time that is saved where both are on their second side; not negative.
        sides: by layer of a pair, the positions of its two choices, float first; it may have no others.
        budget: most time.

    Raises:
        ValueError: a layer of a pair has other choices.
    """
    if any(sorted(both) != list(range(len(losses[at]))) for at, both in sides.items()):
        raise ValueError("a layer of a pair has other choices than the two sides.")
    trade = _Trade(losses, times, pairs, sides)
    free = trade.best(0.0)
    if trade.time(free) <= budget:
        return free
    low, high, found = 0.0, 1.0, None
    for _ in range(_ROUNDS):
        chosen = trade.best(high)
        if trade.time(chosen) <= budget:
            found = chosen
            break
        low, high = high, 4 * high
    for _ in range(_ROUNDS if found is not None else 0):
        rate = (low + high) / 2
        chosen = trade.best(rate)
        if trade.time(chosen) <= budget:
            found, high = chosen, rate
        else:
            low = rate
    return found


def cheapest_with_casts(
    times: Sequence[Sequence[float]],
    pairs: Mapping[tuple[int, int], float],
    sides: Mapping[int, tuple[int, int]],
) -> tuple[int, ...]:
    """Return the choices of the least time, what neighbours save taken off: exactly, by a minimum cut.

    Args:
        times: by layer and choice.
        pairs, sides: as of `choose_with_casts`.
    """
    return _Trade([[0.0] * len(row) for row in times], times, pairs, sides).best(1.0)


@dataclass(frozen=True)
class _Trade:
    """Loss against time; see `choose_with_casts`."""

    losses: Sequence[Sequence[float]]
    times: Sequence[Sequence[float]]
    pairs: Mapping[tuple[int, int], float]
    sides: Mapping[int, tuple[int, int]]

    def best(self, rate: float) -> tuple[int, ...]:
        """Return the choices of the least sum of losses and `rate` times their time."""
        chosen = [
            min(range(len(row)), key=lambda at, layer=layer: self._cost(layer, at, rate))  # type: ignore[misc]
            for layer, row in enumerate(self.losses)
        ]
        items = sorted(self.sides)
        place = {layer: at for at, layer in enumerate(items)}
        # what a and b save, -s a b, is s / 2 where they differ, and -s / 2 for each on its second side
        saved = dict.fromkeys(items, 0.0)
        for pair, time in self.pairs.items():
            for layer in pair:
                saved[layer] += rate * time / 2
        apart = [
            (
                self._cost(layer, self.sides[layer][0], rate),
                self._cost(layer, self.sides[layer][1], rate) - saved[layer],
            )
            for layer in items
        ]
        ties = {(place[one], place[other]): rate * time / 2 for (one, other), time in self.pairs.items()}
        for layer, second in zip(items, minimum_cut(apart, ties), strict=True):
            chosen[layer] = self.sides[layer][int(second)]
        return tuple(chosen)

    def time(self, chosen: Sequence[int]) -> float:
        """Return the time of choices, what neighbours save taken off."""
        total = sum(row[at] for row, at in zip(self.times, chosen, strict=True))
        both = (pair for pair in self.pairs if all(chosen[layer] == self.sides[layer][1] for layer in pair))
        return total - sum(self.pairs[pair] for pair in both)

    def _cost(self, layer: int, choice: int, rate: float) -> float:
        return self.losses[layer][choice] + rate * self.times[layer][choice]
