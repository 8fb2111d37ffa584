# SPDX-License-Identifier: Apache-2.0
"""Histograms of the weights and activations of the layers that lose most, with the grids they are rounded
to."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitfold.compiler.debug.report.data import Distribution, Precision
from splitfold.compiler.debug.report.formatting import short
from splitfold.compiler.debug.report.grids import (
    LARGEST,
    ActivationGridFacts,
    WeightGrid,
    activation_grid_of,
    weight_grid_of,
)
from splitfold.compiler.debug.report.side import Side
from splitfold.passes.activations import activation_stats
from splitfold.passes.ranges import ActivationStats
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.errors import SplitfoldError
from splitfold.runtime.feeds import Array
from splitfold.runtime.target import Target

__all__ = ["distributions", "is_quantized"]

logger = logging.getLogger(__name__)

_SHOWN = 128
"""Bins of a histogram as drawn; it divides `BINS`."""


@dataclass(frozen=True)
class _Tap:
    layer: str
    title: str
    grid: ActivationGridFacts


def distributions(
    layers: Sequence[str],
    index: Mapping[str, int],
    before: Side,
    after: Side,
    data: Calibration | None,
    target: Target,
) -> tuple[Distribution, ...]:
    """Return the histograms of `layers`, layer by layer.

    Args:
        layers: names, the worst first.
        index: place of each layer in the report.
        before, after: the models.
        data: a few batches; None leaves the activations out.
        target: where the compiled model runs.
    """
    taps = [tap for layer in layers for tap in _taps(after, layer)]
    stats = _stats(after.model, taps, data, target)
    found: list[Distribution | None] = []
    for layer in layers:
        found.append(_weight(layer, index[layer], before, after))
        own = [tap for tap in taps if tap.layer == layer and tap.grid.value in stats]
        found += [_activation(tap, index[layer], stats[tap.grid.value]) for tap in own]
    return tuple(item for item in found if item is not None)


def is_quantized(side: Side, layer: str) -> bool:
    """Return whether the layer's weight, input or output is rounded to a grid."""
    return side.precisions.get(layer, Precision.OTHER).is_low_bit or bool(_taps(side, layer))


def _taps(side: Side, layer: str) -> list[_Tap]:
    """Return the quantized input and output of the layer's main node, else those of any of its nodes."""
    main = side.weighted[layer][0] if layer in side.weighted else None
    nodes = [main] if main is not None else list(side.nodes.get(layer, ()))
    top = {id(node) for node in side.model.graph}
    found: dict[str, _Tap] = {}
    for node in (node for node in nodes if id(node) in top):
        for value in node.inputs[: 1 if main is not None else None]:
            if (grid := activation_grid_of(value)) is not None and grid.value:
                found.setdefault(grid.value, _Tap(layer, "input activation", grid))
        for reader in (reader for output in node.outputs for reader in output.consumers()):
            if reader.op_type == "QuantizeLinear":
                grid = activation_grid_of(reader.outputs[0])
                if grid is not None and grid.value:
                    found.setdefault(grid.value, _Tap(layer, "output activation", grid))
    return sorted(found.values(), key=lambda tap: tap.title)[:2]


def _stats(
    model: ir.Model, taps: Sequence[_Tap], data: Calibration | None, target: Target
) -> dict[str, ActivationStats]:
    if data is None or not taps:
        return {}
    names = [tap.grid.value for tap in taps]
    try:
        return activation_stats(model, names, data, target, histograms=True)
    except SplitfoldError as error:
        logger.warning("no histograms of activations: %s", error)
        return {}


def _activation(tap: _Tap, layer: int, stats: ActivationStats) -> Distribution | None:
    histogram, grid = stats.histogram, tap.grid
    if histogram is None:  # constant, or no histogram can hold it
        return None
    ranges = ((grid.low, grid.high),) if grid.low is not None and grid.high is not None else ()
    return Distribution(
        layer,
        tap.title,
        stats.low,
        stats.high,
        tuple(int(count) for count in histogram.reshape(_SHOWN, -1).sum(1)),
        None,
        ranges,
        grid.zero_point,
        grid.scale,
        _beyond(histogram, stats, grid),
        _grid_words(grid, stats),
    )


def _grid_words(grid: ActivationGridFacts, stats: ActivationStats) -> str:
    if grid.scale is None:
        return (
            f"the runtime chooses the grid in each run, from that run's own range; the widest seen is "
            f"{short(stats.low)} to {short(stats.high)}"
        )
    return (
        f"one grid: scale {short(grid.scale)}, zero point {grid.zero_point}, "
        f"range {short(grid.low)} to {short(grid.high)}; seen {short(stats.low)} to {short(stats.high)}"
    )


def _beyond(histogram: Array, stats: ActivationStats, grid: ActivationGridFacts) -> float | None:
    """Return the share of elements that are cut off: more than half a step beyond the grid's ends."""
    if grid.low is None or grid.high is None or grid.scale is None:
        return None
    centers = np.linspace(stats.low, stats.high, histogram.size * 2 + 1)[1::2]
    cut = (centers < grid.low - grid.scale / 2) | (centers > grid.high + grid.scale / 2)
    return float(histogram[cut].sum() / max(histogram.sum(), 1))


def _weight(layer: str, index: int, before: Side, after: Side) -> Distribution | None:
    if layer not in after.weighted:
        return None
    grid = weight_grid_of(after.weighted[layer][0])
    if grid is None:
        return None
    original = _original(before, layer)
    low = min(float(part.min()) for part in (grid.values, original) if part is not None)
    high = max(float(part.max()) for part in (grid.values, original) if part is not None)
    if not np.isfinite([low, high]).all():
        return None
    return Distribution(
        layer=index,
        title="weight",
        low=low,
        high=high,
        counts=_counted(grid.values, low, high),
        original=None if original is None else _counted(original, low, high),
        ranges=_ranges(grid),
        zero=grid.zero,
        step=float(np.median(grid.steps)),
        clipped=None,
        words=_weight_words(grid),
    )


def _original(before: Side, layer: str) -> Array | None:
    """Return the layer's weight before compilation, rows left out as in a large weight's grid, or None."""
    if layer not in before.weighted:
        return None
    node = before.weighted[layer][0]
    held = [value.const_value for value in node.inputs if value is not None and value.const_value is not None]
    floats = [part for part in held if part.dtype.is_floating_point() and part.size > 1]
    if not floats:
        return None
    array = np.asarray(max(floats, key=lambda part: part.size).numpy())
    every = -(-array.size // LARGEST) or 1
    return np.asarray(array[::every], np.float32)


def _counted(values: Array, low: float, high: float) -> tuple[int, ...]:
    counts, _ = np.histogram(values, bins=_SHOWN, range=(low, high) if low < high else (low - 1, high + 1))
    return tuple(int(count) for count in counts)


def _ranges(grid: WeightGrid) -> tuple[tuple[float, float], ...]:
    """Return the narrowest, the median and the widest of the grids' ranges; one where all are equal."""
    order = np.argsort(grid.high - grid.low)
    picked = [order[0], order[len(order) // 2], order[-1]]
    pairs = [(float(grid.low[at]), float(grid.high[at])) for at in picked]
    return tuple(pair for pair, _ in itertools.groupby(pairs))


def _weight_words(grid: WeightGrid) -> str:
    if grid.steps.size == 1:
        return f"{grid.words}, step {short(float(grid.steps[0]))}"
    low, middle, high = (float(np.quantile(grid.steps, q)) for q in (0.0, 0.5, 1.0))
    return f"{grid.words}, steps {short(low)} to {short(high)}, median {short(middle)}"
