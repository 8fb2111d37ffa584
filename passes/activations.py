# SPDX-License-Identifier: Apache-2.0
"""Analysis: the distribution of activations over calibration data, streamed; memory does not grow with the
data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from splitfold.passes.ranges import BINS, ActivationStats
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.errors import CalibrationError
from splitfold.runtime.feeds import Array, model_inputs
from splitfold.runtime.session import Optimization, Session
from splitfold.runtime.target import Target

__all__ = ["activation_stats", "channel_extremes", "channel_rows", "required_calibration"]

logger = logging.getLogger(__name__)

_MOMENTUM = 0.9
_ROWS = 4096
_ROWS_A_BATCH = 512


@dataclass
class _Running:
    low: float = np.inf
    high: float = -np.inf
    average_low: float = np.nan
    average_high: float = np.nan
    squares: float = 0.0
    count: int = 0
    finite: bool = True
    samples: int = 0
    sums: Array = field(default_factory=lambda: np.zeros((2, 2)))
    """Of the lowest and the highest elements of the samples, and of their squares."""

    def update(self, array: Array) -> None:
        if not array.size:
            return
        values = array.astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            self.finite = False
            values = values[np.isfinite(values)]
            if not values.size:
                return
        rows = (
            values.reshape(len(array), -1)
            if values.size == array.size and array.ndim
            else values.reshape(1, -1)
        )
        lows, highs = rows.min(1), rows.max(1)
        self._count_extremes(np.stack([lows, highs]).astype(np.float64))
        low, high = float(lows.min()), float(highs.max())
        first = np.isnan(self.average_low)
        self.average_low = low if first else _MOMENTUM * self.average_low + (1 - _MOMENTUM) * low
        self.average_high = high if first else _MOMENTUM * self.average_high + (1 - _MOMENTUM) * high
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.squares += float(np.sum(np.square(values, dtype=np.float64)))
        self.count += array.size

    def _count_extremes(self, ends: Array) -> None:
        self.samples += ends.shape[1]
        self.sums = self.sums + np.stack([ends.sum(1), np.square(ends).sum(1)])

    def _deviations(self) -> tuple[float, float]:
        mean, square = self.sums / self.samples
        low, high = np.sqrt(np.maximum(square - np.square(mean), 0)).tolist()
        return low, high

    def stats(self) -> ActivationStats:
        if not self.count:
            return ActivationStats(0.0, 0.0, 0.0, 0.0, 0.0, self.finite, 0)
        rms = float(np.sqrt(self.squares / self.count))
        low, high = self._deviations()
        return ActivationStats(
            self.low,
            self.high,
            self.average_low,
            self.average_high,
            rms,
            self.finite,
            self.count,
            samples=self.samples,
            low_deviation=low,
            high_deviation=high,
        )


def required_calibration(calibration: Calibration | None, pass_name: str, model: ir.Model) -> Calibration:
    """Return the calibration data checked against `model`.

    Raises:
        CalibrationError: there is none.
    """
    if calibration is None:
        raise CalibrationError(
            f"{pass_name} needs calibration data: pass calibration=... (a list of feeds, a generator "
            "function, an .npz path), "
            "or --calibration DATA; a hundred typical inputs are enough."
        )
    return calibration.checked(model)


def activation_stats(
    model: ir.Model,
    values: Iterable[str],
    calibration: Calibration,
    target: Target,
    *,
    histograms: bool = False,
) -> dict[str, ActivationStats]:
    """Run the float model over the calibration data and return the statistics of the named values.

    Args:
        model: float model; it is not changed.
        values: names of float values at the top level of the graph (graph inputs included).
        calibration: one walk, or two where `histograms` are wanted.
        target: where the model runs.
        histograms: also fill a histogram of each finite value.

    Raises:
        CalibrationError: a batch does not fit, or the data is empty.
    """
    names = list(dict.fromkeys(values))
    session = _tapped(model, target, names)
    running = {name: _Running() for name in names}
    batches = _walk(session, calibration, names, lambda name, array: running[name].update(array))
    if not batches:
        raise CalibrationError("the calibration data is empty: at least one batch is needed.")
    stats = {name: state.stats() for name, state in running.items()}
    logger.info("calibrated %d values on %d batches", len(names), batches)
    return _with_histograms(session, calibration, stats) if histograms else stats


def _tapped(model: ir.Model, target: Target, names: Sequence[str]) -> Session:
    """Open `model` with `names` tapped, but for what is fed: not every provider hands that back."""
    fed = {value.name for value in model_inputs(model)}
    taps = [name for name in names if name not in fed]
    return Session(model, target, optimization=Optimization.ALL, taps=taps)


def _walk(
    session: Session, calibration: Calibration, names: Sequence[str], use: Callable[[str, Array], None]
) -> int:
    batches = 0
    for feeds in calibration:
        results = session.run(feeds, [name for name in names if name not in feeds])
        results |= {name: np.asarray(feeds[name]) for name in names if name in feeds}
        for name in names:
            use(name, results[name])
        batches += 1
    return batches


@dataclass
class _Histograms:
    stats: dict[str, ActivationStats]
    counts: dict[str, Array] = field(default_factory=dict)

    def add(self, name: str, array: Array) -> None:
        stats = self.stats[name]
        counts, _ = np.histogram(array, bins=BINS, range=(stats.low, stats.high))
        self.counts[name] = self.counts.get(name, np.zeros(BINS, np.int64)) + counts


def _with_histograms(
    session: Session, calibration: Calibration, stats: dict[str, ActivationStats]
) -> dict[str, ActivationStats]:
    wanted = [name for name, item in stats.items() if item.unholdable() is None and item.low < item.high]
    histograms = _Histograms(stats)
    _walk(session, calibration, wanted, histograms.add)
    return {name: replace(item, histogram=histograms.counts.get(name)) for name, item in stats.items()}


def channel_extremes(
    model: ir.Model, values: Iterable[str], calibration: Calibration, target: Target
) -> dict[str, tuple[Array, Array]]:
    """Return, for each named value, the lowest and highest element of every channel of its last axis (two
    float32 [channels]).

    Raises:
        CalibrationError: a batch does not fit, or the data is empty.
    """
    names = list(dict.fromkeys(values))
    session = _tapped(model, target, names)
    seen: dict[str, tuple[Array, Array]] = {}

    def use(name: str, array: Array) -> None:
        rows = array.reshape(-1, array.shape[-1]).astype(np.float32, copy=False)
        if rows.size:
            low, high = rows.min(0), rows.max(0)
            old = seen.get(name, (low, high))
            seen[name] = (np.minimum(old[0], low), np.maximum(old[1], high))

    _walk(session, calibration, names, use)
    return seen


def channel_rows(
    model: ir.Model, values: Iterable[str], calibration: Calibration, target: Target
) -> dict[str, Array]:
    """Return, for each named value, a sample of the rows along its last axis, float32 [rows, channels]: at
    most 512 of each batch, evenly spaced, and 4096 in all.

    Raises:
        CalibrationError: a batch does not fit, or the data is empty.
    """
    names = list(dict.fromkeys(values))
    session = _tapped(model, target, names)
    kept: dict[str, list[Array]] = {name: [] for name in names}

    def use(name: str, array: Array) -> None:
        rows = array.reshape(-1, array.shape[-1]).astype(np.float32, copy=False)
        left = _ROWS - sum(map(len, kept[name]))
        kept[name].append(rows[:: max(1, -(-len(rows) // _ROWS_A_BATCH))][:left].copy())

    _walk(session, calibration, names, use)
    return {name: np.concatenate(parts) for name, parts in kept.items()}
