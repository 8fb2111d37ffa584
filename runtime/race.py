# SPDX-License-Identifier: Apache-2.0
"""Which of two is faster: they take turns for a bounded time, and the median of the turns' ratios decides,
with an interval that says how sure that is."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitfold.runtime.feeds import Feeds
from splitfold.runtime.session import Session
from splitfold.runtime.target import Target

__all__ = ["Race", "race", "race_models", "race_of"]

_MOST_RUNS = 5
"""Timed runs of each in a turn."""
_WANTED_TURNS, _LEAST_TURNS, _MOST_TURNS = 15, 3, 300
_PATIENCE = 5.0
"""Multiple of the time asked for after which even the least number of turns is not waited for."""
_TAIL = 0.025
"""Chance at each end of the interval of a median."""

Clock = Callable[[], float]


@dataclass(frozen=True)
class Race:
    """What came of two that took turns.

    Attributes:
        before_ms, after_ms: median over the turns of each one's median time, in milliseconds.
        ratio: median over the turns of the first one's time over the second one's: above 1 the second is
            faster. What else the machine does falls on both of a turn.
        low, high: 95 % interval of that median, from order statistics; the extremes below six turns.
        turns: how many.
    """

    before_ms: float
    after_ms: float
    ratio: float
    low: float
    high: float
    turns: int

    def slower(self, margin: float = 0.01) -> bool:
        """Whether the second is slower: by more than `margin`, and surely so, which takes three turns."""
        return self.turns >= _LEAST_TURNS and self.ratio < 1 - margin and self.high < 1

    def __str__(self) -> str:
        return f"{self.ratio:.2f}x ({self.before_ms:.3f} > {self.after_ms:.3f} ms)"


def race_of(before: Sequence[float], after: Sequence[float]) -> Race:
    """Return the race of these times in milliseconds, one pair a turn.

    The interval is that of the sign test: of n ratios it goes from the k-th smallest to the k-th largest,
    where k is the largest number with P(B < k) <= 0.025, B binomial of n and 1/2; below six turns k is 1.
    """
    ratios = sorted(one / other for one, other in zip(before, after, strict=True))
    edge = _edge(len(ratios))
    return Race(
        statistics.median(before),
        statistics.median(after),
        statistics.median(ratios),
        ratios[edge],
        ratios[-1 - edge],
        len(ratios),
    )


def _edge(count: int) -> int:
    """Return the position, among `count` sorted numbers, where the interval of their median begins."""
    below, edge = 0.0, 0
    for position in range(count // 2):
        below += math.comb(count, position) * 0.5**count
        if below > _TAIL:
            break
        edge = position
    return edge


def race(
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    seconds: float,
    clock: Clock = time.perf_counter,
) -> Race:
    """Run both in turns for about `seconds` and return what they took.

    Runs that are long beside `seconds` still get three turns, and one turn where even that takes several
    times as long.

    Args:
        first, second: what is timed; each call is one run.
        seconds: when no further turn begins, warm-up included.
        clock: seconds since any moment.
    """
    start = clock()
    both = (first, second)
    for run in both:
        run()
    once = sum(_turn(run, 1, clock, math.inf) for run in both) / 1e3
    runs = max(1, min(_MOST_RUNS, int(seconds / (_WANTED_TURNS * max(once, 1e-9))) - 1))
    times: tuple[list[float], list[float]] = ([], [])
    while _goes_on(len(times[0]), clock() - start, seconds):
        order = (0, 1) if len(times[0]) % 2 == 0 else (1, 0)
        for at in order:
            if runs > 1 and clock() - start < seconds:
                both[at]()  # brings its threads and caches back
            times[at].append(_turn(both[at], runs, clock, start + seconds))
    return race_of(*times)


def _goes_on(turns: int, spent: float, seconds: float) -> bool:
    if turns < _LEAST_TURNS:
        return turns == 0 or spent < _PATIENCE * seconds
    return turns < _MOST_TURNS and spent < seconds


def _turn(run: Callable[[], object], count: int, clock: Clock, end: float) -> float:
    """Return the median milliseconds of up to `count` runs, none begun after `end` but the first."""
    found: list[float] = []
    while not found or (len(found) < count and clock() < end):
        start = clock()
        run()
        found.append((clock() - start) * 1e3)
    return statistics.median(found)


def race_models(
    before: ir.Model, after: ir.Model, feeds: Feeds, *, seconds: float, target: Target | None = None
) -> Race:
    """Race two models with the same inputs, as deployed, with the runtime's own choice of threads.

    Raises:
        SessionError: a model does not open or does not run on `feeds`.
    """
    place = (target or Target.cpu()).taking_turns()
    first, second = Session(before, place), Session(after, place)
    return race(lambda: first.run(feeds), lambda: second.run(feeds), seconds=seconds)
