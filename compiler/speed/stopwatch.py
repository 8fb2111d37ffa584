# SPDX-License-Identifier: Apache-2.0
"""What takes the times: a value, so that whoever needs other times than the clock's can give them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from splitfold.compiler.debug.profile.times import ProfileRow, profile
from splitfold.runtime.feeds import Feeds
from splitfold.runtime.race import Race, race_models
from splitfold.runtime.target import Target

__all__ = ["LayerTime", "Stopwatch", "WallClock"]

_RUNS = 20


@dataclass(frozen=True)
class LayerTime:
    """What two models take for the same layers, a run.

    Attributes:
        layers: the user's names; several where one of the two computes them in one kernel.
        before_us, after_us: microseconds in the first and in the second model.
        runs_as: operators that compute them in the second.
    """

    layers: tuple[str, ...]
    before_us: float
    after_us: float
    runs_as: str = ""

    @property
    def lost_us(self) -> float:
        """What the second takes longer; negative where it is faster."""
        return self.after_us - self.before_us


class Stopwatch(Protocol):
    """Times two models with the same inputs side by side."""

    def race(
        self, before: ir.Model, after: ir.Model, feeds: Feeds, *, seconds: float, target: Target
    ) -> Race:
        """Return which one is faster as a whole, after about `seconds`."""

    def layers(
        self, before: ir.Model, after: ir.Model, feeds: Feeds, *, target: Target
    ) -> tuple[LayerTime, ...]:
        """Return what each takes layer by layer."""


@dataclass(frozen=True)
class WallClock:
    """The machine's clock, and for layers the runtime's own profiler.

    Args:
        runs: timed runs of each model under the profiler.
    """

    runs: int = _RUNS

    def race(
        self, before: ir.Model, after: ir.Model, feeds: Feeds, *, seconds: float, target: Target
    ) -> Race:
        """See `Stopwatch`."""
        return race_models(before, after, feeds, seconds=seconds, target=target)

    def layers(
        self, before: ir.Model, after: ir.Model, feeds: Feeds, *, target: Target
    ) -> tuple[LayerTime, ...]:
        """See `Stopwatch`."""
        found = profile(before, after, feeds=feeds, runs=self.runs, target=target)
        return tuple(_layer_time(row) for row in found.rows if row.layers)


def _layer_time(row: ProfileRow) -> LayerTime:
    before, after = (0.0 if side is None else side.microseconds for side in (row.before, row.after))
    return LayerTime(row.layers, before, after, "" if row.after is None else row.after.named())
