# SPDX-License-Identifier: Apache-2.0
"""Measuring kernels: the forms of one operation at one shape take turns, beside a model that does nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from splitfold.runtime.costs.builder import Builder, Built
from splitfold.runtime.costs.kernel import Case, Operation, Shape
from splitfold.runtime.costs.models import case_model
from splitfold.runtime.costs.table import Sample
from splitfold.runtime.errors import SessionError
from splitfold.runtime.session import Session
from splitfold.runtime.target import Target

__all__ = ["Measured", "Meter", "SessionMeter", "measure_cases"]

_LEAST_ROUNDS, _MOST_ROUNDS = 3, 40
_WARM_UP = 1
_SHORT = 5.0
"""Milliseconds of a run below which each timed one is led by an untimed one."""
_STEADY = 1.5
"""Ratio of the quartiles beyond which a measurement was disturbed."""
_FLOOR = 0.02
"""Least share of its own time that is left to a kernel when the empty model's time is taken off."""


class Meter(Protocol):
    """Times models side by side."""

    def __call__(self, models: Sequence[Built]) -> list[list[float] | str]:
        """Return the milliseconds of each run of each model, or why it does not run."""


@dataclass(frozen=True)
class SessionMeter:
    """Opens the models on a target, and lets them take turns for a bounded time.

    Args:
        target: where they run.
        threads: intra-operator threads; 0 is the runtime's choice.
        seconds: of one call; each model has three turns in any case.
        clock: seconds since any moment.
    """

    target: Target
    threads: int = 0
    seconds: float = 0.4
    clock: Callable[[], float] = time.perf_counter

    def __call__(self, models: Sequence[Built]) -> list[list[float] | str]:
        """See `Meter`."""
        found: list[list[float] | str] = []
        runs: dict[int, Callable[[], object]] = {}
        for at, item in enumerate(models):
            try:
                session = Session(item.model, self.target.taking_turns(), threads=self.threads)
                for _ in range(_WARM_UP):
                    session.run(item.feeds)
            except SessionError as error:
                found.append(str(error))
                continue
            found.append([])
            runs[at] = lambda session=session, feeds=item.feeds: session.run(feeds)  # type: ignore[misc]
        self._take_turns(runs, found)
        return found

    def _take_turns(self, runs: Mapping[int, Callable[[], object]], found: list[list[float] | str]) -> None:
        order, start = list(runs), self.clock()
        for turn in range(_MOST_ROUNDS):
            if turn >= _LEAST_ROUNDS and self.clock() - start > self.seconds:
                return
            for at in order[turn % len(order) :] + order[: turn % len(order)]:
                times = found[at]
                if isinstance(times, list):
                    if not times or times[-1] < _SHORT:
                        runs[at]()  # brings its threads and caches back
                    times.append(self._timed(runs[at]))

    def _timed(self, run: Callable[[], object]) -> float:
        start = self.clock()
        run()
        return (self.clock() - start) * 1e3


@dataclass(frozen=True)
class Measured:
    """What came of measuring cases.

    Attributes:
        samples: by case.
        failed: by case, why it does not run.
    """

    samples: Mapping[Case, Sample]
    failed: Mapping[Case, str]


def measure_cases(
    cases: Iterable[Case],
    meter: Meter,
    *,
    again: int = 2,
    tell: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Measured:
    """Measure `cases`, those of one operation and shape side by side.

    Args:
        cases: what to measure; each counts once.
        meter: what takes the times.
        again: how often at most a group is measured once more because something disturbed it: of each case
            the smallest median counts, as other load only adds.
        tell: is called before each group with how many are done, of how many, and what is next.

    Raises:
        SessionError: not even an empty model runs.
    """
    groups: dict[tuple[Operation, Shape], list[Case]] = {}
    for case in dict.fromkeys(cases):
        groups.setdefault((case.kernel.operation, case.shape), []).append(case)
    samples: dict[Case, Sample] = {}
    failed: dict[Case, str] = {}
    for done, ((operation, shape), group) in enumerate(groups.items()):
        tell(done, len(groups), f"{operation.value} {'x'.join(map(str, shape))}")
        models = [_empty(), *(case_model(case) for case in group)]
        for _ in range(1 + again):
            found, lacking = _measured(group, meter(models))
            failed |= lacking
            calmest = {
                case: min(samples.get(case, sample), sample, key=lambda item: item.milliseconds)
                for case, sample in found.items()
            }
            samples |= calmest
            if all(sample.high <= _STEADY * sample.low for sample in calmest.values()):
                break
    return Measured(samples, failed)


def _measured(
    group: Sequence[Case], times: Sequence[list[float] | str]
) -> tuple[dict[Case, Sample], dict[Case, str]]:
    """Return the samples, and why the other cases have none; `times` begin with those of an empty model."""
    nothing, *found = times
    if isinstance(nothing, str):
        raise SessionError(nothing)
    both = list(zip(group, found, strict=True))
    return (
        {case: _sample(item, statistics.median(nothing)) for case, item in both if not isinstance(item, str)},
        {case: item for case, item in both if isinstance(item, str)},
    )


def _empty() -> Built:
    """Return a model that does next to nothing: what a session's call takes by itself."""
    graph = Builder()
    return graph.built(graph.one("Identity", graph.input(np.zeros(1, np.float32))))


def _sample(times: Sequence[float], nothing: float) -> Sample:
    low, middle, high = (float(item) for item in np.percentile(times, [25, 50, 75]))
    middle, low, high = (max(item - nothing, _FLOOR * item) for item in (middle, low, high))
    return Sample(middle, low, high, len(times))
