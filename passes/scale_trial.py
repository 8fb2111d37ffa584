# SPDX-License-Identifier: Apache-2.0
"""Trial of scales: what each group's int8 output gains by them, measured before anything is folded."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from splitfold.passes.affine import ActivationGrid, activation_grid
from splitfold.passes.fold import multiply_input
from splitfold.passes.foldable import ScaleGroup
from splitfold.passes.layers import Layer, find_layers
from splitfold.passes.static_int8 import trial_carrier
from splitfold.passes.trial import local_sqnr
from splitfold.passes.values import forget_names
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
    plain = _trial(model, factors, {}, seen, calibration, target)
    scaled = _trial(model, factors, factors, seen, calibration, target)
    return plain, scaled


def _trial(
    model: ir.Model,
    tried: Mapping[str, Array],
    factors: Mapping[str, Array],
    seen: Mapping[str, tuple[Array, Array]],
    calibration: Calibration,
    target: Target,
) -> Mapping[str, float]:
    """Return the static int8 SQNR of the layers that make the values `tried`, inputs divided by `factors`."""
    copy = model.clone()
    forget_names(copy)
    grids: dict[str, ActivationGrid] = {}
    layers = [layer for layer in find_layers(copy)[0] if layer.output.name in tried]
    shared: dict[tuple[str, bytes], list[Layer]] = {}
    for layer in layers:
        factor = factors.get(layer.output.name or "")
        low, high = seen[layer.input.name or ""]
        if factor is None:
            grids[layer.input.name or ""] = activation_grid(float(low.min()), float(high.max()))
        else:
            shared.setdefault((layer.input.name or "", factor.tobytes()), []).append(layer)
    for readers in shared.values():
        factor = factors[readers[0].output.name or ""]
        low, high = seen[readers[0].input.name or ""]
        channels = np.arange(factor.size)
        inner = multiply_input(ScaleGroup(dict.fromkeys(readers, channels), factor.size, None), factor)
        grids[inner.name or ""] = activation_grid(float((low / factor).min()), float((high / factor).max()))
    current = [layer.current() for layer in layers]
    return local_sqnr(copy, trial_carrier(current, grids, _LEVELS), calibration, target)
