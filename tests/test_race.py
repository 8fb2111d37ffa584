# SPDX-License-Identifier: Apache-2.0
"""Races of two: the median of the turns' ratios, its interval, and a bounded time by any clock."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from small import mlp, samples

from splitfold.runtime.race import race, race_models, race_of


class _Clock:
    """A clock that only the runs move on."""

    def __init__(self) -> None:
        self.now = 100.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def takes(self, name: str, *seconds: float) -> Callable[[], None]:
        """Return a run that takes these times in turn."""
        count = 0

        def run() -> None:
            nonlocal count
            self.order.append(name)
            self.now += seconds[count % len(seconds)]
            count += 1

        return run


def test_median_and_interval_by_hand() -> None:
    ratios = [0.5, 0.8, 0.9, 1.1, 1.2, 1.3, 1.4, 2.0, 4.0]
    found = race_of([ratio * 2 for ratio in ratios], [2.0] * 9)
    assert (found.ratio, found.low, found.high, found.turns) == (1.2, 0.8, 2.0, 9)
    assert (found.before_ms, found.after_ms) == (2.4, 2.0)


@pytest.mark.parametrize("turns", [6, 7, 8, 9, 12, 25, 100, 299])
def test_the_interval_holds_the_median_in_95_of_100_and_no_narrower_one_does(turns: int) -> None:
    values = [1.0 + at for at in range(turns)]
    low = race_of(values, [1.0] * turns).low
    position = values.index(low)

    def outside(edge: int) -> float:
        return 2 * sum(math.comb(turns, at) for at in range(edge + 1)) / 2**turns

    assert outside(position) <= 0.05
    assert outside(position + 1) > 0.05


def test_slower_needs_a_sure_difference_beyond_the_margin() -> None:
    assert race_of([1.0] * 8, [1.2] * 8).slower()
    assert not race_of([1.0] * 8, [1.005] * 8).slower()
    assert race_of([1.0] * 8, [1.005] * 8).slower(0.001)
    assert not race_of([1.0] * 8, [1.2] * 4 + [1.1] * 3 + [0.9]).slower(), "one turn of eight says otherwise"
    assert not race_of([1.2] * 8, [1.0] * 8).slower()


def test_a_race_is_bounded_and_its_turns_change_sides() -> None:
    clock = _Clock()
    found = race(clock.takes("a", 0.01), clock.takes("b", 0.02), seconds=2.0, clock=clock)
    assert found.ratio == pytest.approx(0.5)
    assert 2.0 <= clock.now - 100 < 2.2, "no turn begins after two seconds"
    body = clock.order[4:]
    turn = body.index("b")
    assert body[:turn] == ["a"] * turn
    assert body[turn : 3 * turn] == ["b"] * 2 * turn
    assert found.turns >= 10


def test_slow_runs_still_take_three_turns_and_fast_ones_end_early() -> None:
    clock = _Clock()
    found = race(clock.takes("a", 0.5), clock.takes("b", 0.6), seconds=2.0, clock=clock)
    assert (found.turns, len(clock.order)) == (3, 2 * (1 + 1 + 3))
    assert found.slower()
    clock = _Clock()
    found = race(clock.takes("a", 1e-6), clock.takes("b", 1e-6), seconds=2.0, clock=clock)
    assert found.turns == 300
    assert clock.now - 100 < 0.1


def test_very_slow_runs_take_one_turn_which_decides_nothing() -> None:
    clock = _Clock()
    found = race(clock.takes("a", 30.0), clock.takes("b", 40.0), seconds=2.0, clock=clock)
    assert (found.turns, len(clock.order)) == (1, 2 * (1 + 1 + 1))
    assert found.ratio == 0.75
    assert not found.slower()


def test_a_machine_that_becomes_slow_ends_the_turn() -> None:
    clock = _Clock()
    first, second = ([0.001] * 8 + [3.0] * 99 for _ in range(2))
    found = race(clock.takes("a", *first), clock.takes("b", *second), seconds=2.0, clock=clock)
    assert found.turns == 3
    assert clock.now - 100 < 20


def test_one_load_that_falls_on_both_of_a_turn_changes_no_ratio() -> None:
    clock = _Clock()
    load = [0.001] * 40 + [0.05] * 40
    first = clock.takes("a", *load)
    second = clock.takes("b", *(2 * item for item in load))
    assert race(first, second, seconds=2.0, clock=clock).ratio == pytest.approx(0.5, rel=0.02)


def test_models_race_as_deployed() -> None:
    model = ir.from_proto(mlp())
    found = race_models(model, model.clone(), {"x": samples(4).astype(np.float32)}, seconds=0.05)
    assert found.turns >= 3
    assert 0 < found.low <= found.ratio <= found.high
