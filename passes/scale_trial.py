# SPDX-License-Identifier: Apache-2.0
"""Trial of scales: what each group's int8 output gains by them, measured before anything is folded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from splitfold.passes.affine import ActivationGrid, activation_grid
from splitfold.passes.fold import multiply_input
from splitfold.passes.foldable import ScaleGroup
from splitfold.passes.layers import Layer
from splitfold.passes.static_int8 import trial_carrier
from splitfold.passes.trial import Trial
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.feeds import Array
from splitfold.runtime.target import Target

__all__ = ["try_scales"]

_LEVELS = 127


def try_scales(
    model: ir.Model,
    scales: Mapping[ScaleGroup, Array],
    seen: Mapping[str, tuple[Array, Array]],
    calibration: Calibration,
    target: Target,
) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Return the SQNR in dB of the static int8 output of each layer of linear groups, by name: without the
    scales, and with them.

    Args:
        model: float model, not changed.
        scales: float32 [group.scales] by group.
        seen: lowest and highest element of every channel of each input, by value name.
        calibration: representative inputs.
        target: where the trial runs.
    """
    factors = {
        layer.output.name or "": group.spread(layer, found)
        for group, found in scales.items()
        for layer in group.layers
    }
    trial = Trial(model)
    layers = [layer for layer in trial.layers if layer.output.name in factors]
    grids = {name: _grid(*seen[name]) for name in {layer.input.name or "" for layer in layers}}
    trial.add(trial_carrier(layers, grids, _LEVELS))
    grids = _scaled(layers, factors, seen)
    trial.add(trial_carrier([layer.current() for layer in layers], grids, _LEVELS))
    plain, scaled = trial.measure(calibration, target)
    return plain, scaled


def _scaled(
    layers: Sequence[Layer], factors: Mapping[str, Array], seen: Mapping[str, tuple[Array, Array]]
) -> dict[str, ActivationGrid]:
    """Divide the inputs of `layers` by `factors` in front of their readers, and return the new inputs' grids
    by name."""
    grids: dict[str, ActivationGrid] = {}
    shared: dict[tuple[str, bytes], list[Layer]] = {}
    for layer in layers:
        factor = factors[layer.output.name or ""]
        shared.setdefault((layer.input.name or "", factor.tobytes()), []).append(layer)
    for (name, _), readers in shared.items():
        factor = factors[readers[0].output.name or ""]
        low, high = seen[name]
        channels = np.arange(factor.size)
        inner = multiply_input(ScaleGroup(dict.fromkeys(readers, channels), factor.size, None), factor)
        grids[inner.name or ""] = _grid(low / factor, high / factor)
    return grids


def _grid(low: Array, high: Array) -> ActivationGrid:
    return activation_grid(float(low.min()), float(high.max()))
