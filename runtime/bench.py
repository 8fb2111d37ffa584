# SPDX-License-Identifier: Apache-2.0
"""Latency of models side by side: interleaved turns, warmed up, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from splitfold.runtime.feeds import Feeds
from splitfold.runtime.options import SessionOptions
from splitfold.runtime.session import Session
from splitfold.runtime.target import Target
from splitfold.runtime.turns import turns

__all__ = ["Timing", "bench"]


@dataclass(frozen=True)
class Timing:
    """What one model took.

    Attributes:
        median_ms: median of all timed runs, in milliseconds.
        low_ms, high_ms: first and ninth decile.
        runs: number of timed runs.
        ratio: median of the first model over this one's; above 1 is faster than the first.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int
    ratio: float


def bench(
    models: Sequence[ir.Model | str | Path],
    feeds: Feeds,
    *,
    runs: int = 50,
    warm_up: int = 5,
    threads: int = 0,
    target: Target | None = None,
    options: Sequence[SessionOptions] = (),
) -> list[Timing]:
    """Time `models` on the same feeds and return one `Timing` each, in order.

    The models take turns, see `splitfold.runtime.turns`.

    Args:
        models: models in memory or paths of ``.onnx`` files, with the same inputs.
        feeds: one set of inputs.
        runs: timed runs of each model.
        warm_up: untimed runs of each before the first turn.
        threads: intra-operator threads; 0 is the runtime's choice.
        target: where they run.
        options: what the sessions are opened with, one each; empty is as `target` says.

    Raises:
        SessionError: a model does not open or does not run on `feeds`.
        ValueError: `runs` is not positive, or `options` are not as many as the models.
    """
    schedule = list(turns(len(models), runs))
    place = target or Target.cpu()
    asked = options or [place.options] * len(models)
    sessions = [
        Session(model, place.with_options(its).taking_turns(), threads=threads)
        for model, its in zip(models, asked, strict=True)
    ]
    for session in sessions:
        for _ in range(warm_up):
            session.run(feeds)
    times: list[list[float]] = [[] for _ in sessions]
    for at, count in schedule:
        times[at] += _turn(sessions[at], feeds, count)
    return _timings(times)


def _turn(session: Session, feeds: Feeds, count: int) -> list[float]:
    session.run(feeds)
    found = []
    for _ in range(count):
        start = time.perf_counter()
        session.run(feeds)
        found.append((time.perf_counter() - start) * 1e3)
    return found


def _timings(times: Sequence[Sequence[float]]) -> list[Timing]:
    medians = [statistics.median(found) for found in times]
    result = []
    for found, median in zip(times, medians, strict=True):
        ordered = sorted(found)
        edge = len(ordered) // 10
        result.append(Timing(median, ordered[edge], ordered[-1 - edge], len(ordered), medians[0] / median))
    return result
