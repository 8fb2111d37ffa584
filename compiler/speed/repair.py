# SPDX-License-Identifier: Apache-2.0
"""Never slower: the result is raced against the model as it was given, and where it loses, layers go to
dynamic int8 or back to float until it does not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from splitfold.compiler.build import Built, Job
from splitfold.compiler.source import Source
from splitfold.compiler.speed.exclusion import bare, in_float, in_int8, lowered_by, without_low_bits
from splitfold.compiler.speed.options import SpeedCheck
from splitfold.compiler.speed.outcome import Speed
from splitfold.compiler.speed.stopwatch import LayerTime
from splitfold.passes.pipeline import Pipeline
from splitfold.runtime.errors import SessionError
from splitfold.runtime.feeds import model_inputs
from splitfold.runtime.model_file import weight_bytes
from splitfold.runtime.race import Race
from splitfold.runtime.target import Carrier

__all__ = ["Rebuild", "check_speed"]

logger = logging.getLogger(__name__)

_SHARES = (0.003, 0.0)
"""Share of the original's time by which a layer must be slower to go back: in the first attempt, and then."""
_NOISE = 1.05
"""Ratio of two medians of one kernel below which they count as equal."""

_SHOWN = 4
"""Layers that a warning names."""

Rebuild = Callable[[Pipeline], Built]


def check_speed(
    job: Job, built: Built, check: SpeedCheck, rebuild: Rebuild, *, kept: str = ""
) -> tuple[Built, Speed]:
    """Return the build to keep, and how fast it is.

    Args:
        job: what was built.
        built: what came of it.
        check: how.
        rebuild: builds another pipeline for the same job.
        kept: why a slower result stays as it is; empty where layers may go back to float.

    Raises:
        SplitfoldError: a rebuild failed.
    """
    if reason := _unmeasurable(job.source, check):
        return built, Speed(None, note=reason)
    try:
        return _Repair(job, check, rebuild).run(built, kept or _guessed(job.source))
    except SessionError as error:
        return built, Speed(None, note=str(error))


def _unmeasurable(source: Source, check: SpeedCheck) -> str:
    if not source.opens:
        return f"the model cannot be run here ({source.unverified})"
    size = weight_bytes(source.model) / 1e6
    if size > check.megabytes:
        return (
            f"the model has {size:.0f} MB of weights, more than {check.megabytes:g}, and both would be "
            "opened at once; splitfold bench measures it"
        )
    return ""


def _guessed(source: Source) -> str:
    """Return why the times say little of the user's own inputs, or an empty text."""
    dynamic = [
        value.name
        for value in model_inputs(source.model)
        if value.shape is None or not value.shape.is_static()
    ]
    if not source.synthetic or not dynamic:
        return ""
    return (
        f"It stays as it is: the sizes of input '{dynamic[0]}' were made up; give example inputs "
        "(--inputs) or calibration data."
    )


@dataclass(frozen=True)
class _Attempt:
    """One result, and how fast it is."""

    built: Built
    race: Race


class _Repair:
    """The result, and what is tried in its place."""

    def __init__(self, job: Job, check: SpeedCheck, rebuild: Rebuild) -> None:
        self._job, self._check, self._rebuild = job, check, rebuild

    def run(self, built: Built, kept: str) -> tuple[Built, Speed]:
        first = self._attempt(built)
        if not first.race.slower(self._check.margin):
            return built, Speed(first.race)
        slow = self._slow(built, _SHARES[0])
        _warn(first.race, slow)
        if kept:
            return built, Speed(first.race, slow=slow, note=kept)
        best = self._repaired(first, slow)
        if best is first:
            return built, Speed(first.race, slow=slow, note="Nothing that was tried is faster.")
        return best.built, _speed(first, best, slow, self._check.margin)

    def _repaired(self, first: _Attempt, slow: Sequence[LayerTime]) -> _Attempt:
        """Return the first attempt that is as fast as the model as it was given, else the fastest.

        Layers with weights in blocks, which are slow at many rows, first go to dynamic int8; what is slower
        still goes back to float, then all of it, then every pass that is not needed is left out.
        """
        tried = [first]
        for at in range(self._check.attempts):
            last = tried[-1].built
            names = _named(last, slow if at == 0 else self._slow(last, _SHARES[1]))
            if not names:
                break
            changed = in_int8 if at == 0 and self._has_int8 else in_float
            tried.append(self._attempt(self._rebuild(changed(last.steps, last.records, names))))
            if self._is_enough(tried[-1].race):
                return tried[-1]
        steps = self._job.steps
        for less in dict.fromkeys((without_low_bits(steps), bare(steps))):
            if less != steps:
                tried.append(self._attempt(self._rebuild(less)))
                if self._is_enough(tried[-1].race):
                    return tried[-1]
        best = max(tried, key=lambda item: item.race.ratio)
        if best is not first and best is not tried[-1]:
            best = self._attempt(self._rebuild(best.built.steps))  # observers saw others after it
        return best

    @property
    def _has_int8(self) -> bool:
        """Whether a layer may go to dynamic int8 first: what that costs it can be measured."""
        return self._job.source.calibration is not None and self._job.target.carries(Carrier.DYNAMIC_INT8)

    def _is_enough(self, found: Race) -> bool:
        return found.ratio >= 1 - self._check.margin

    def _attempt(self, built: Built) -> _Attempt:
        job, check = self._job, self._check
        found = check.stopwatch.race(
            job.source.model, built.model, job.source.feeds, seconds=check.seconds, target=job.target
        )
        logger.info("%s with %s", found, built.steps)
        return _Attempt(built, found)

    def _slow(self, built: Built, share: float) -> tuple[LayerTime, ...]:
        """Return the layers that are slower than in the model as it was given, by more than `share` of its
        time, the worst first."""
        job = self._job
        times = self._check.stopwatch.layers(
            job.source.model, built.model, job.source.feeds, target=job.target
        )
        least = share * sum(item.before_us for item in times)
        slow = [item for item in times if item.after_us > _NOISE * item.before_us and item.lost_us > least]
        return tuple(sorted(slow, key=lambda item: -item.lost_us))


def _named(built: Built, slow: Sequence[LayerTime]) -> set[str]:
    """Return the low-bit layers of `built` that are among `slow`."""
    rows = {name for item in slow for name in item.layers}
    candidates = lowered_by(built.steps, built.records)
    return {layer for layer in candidates if layer in rows or rows.intersection(layer.split("+"))}


def _speed(first: _Attempt, best: _Attempt, slow: tuple[LayerTime, ...], margin: float) -> Speed:
    before, after = (lowered_by(item.built.steps, item.built.records) for item in (first, best))
    names = {step.name for step in best.built.steps}
    return Speed(
        best.race,
        first=first.race,
        slow=slow,
        put_back=tuple(layer for layer in before if layer not in after),
        in_int8=tuple(layer for layer in before if layer in after and after[layer] != before[layer]),
        left_out=tuple(step.name for step in first.built.steps if step.name not in names),
        note="Nothing that was tried is faster." if best.race.ratio < 1 - margin else "",
    )


def _warn(race: Race, slow: Sequence[LayerTime]) -> None:
    logger.warning(
        "the result is slower than the model: %s; %d layers are: %s",
        race,
        len(slow),
        ", ".join("+".join(item.layers) for item in slow[:_SHOWN]) or "none that the profiler can tell",
    )
