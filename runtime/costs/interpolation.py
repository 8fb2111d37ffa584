# SPDX-License-Identifier: Apache-2.0
"""Times between measured shapes: moving least squares over logarithms.

Near a shape the time is taken for a power law of its sizes, t = work * exp(c) * size_1^a_1 * ..., fitted to
the measured shapes with weights that fall with the distance: it goes through every measured point and gives
power laws back where the points determine them. Where they do not, the exponents are those of the work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from splitfold.runtime.costs.kernel import Operation, Shape, work

__all__ = ["interpolated"]

_POWER = 4
"""Weights fall with this power of the distance."""
_RIDGE = 1e-6
"""Of the exponents beyond those of the work, relative to the weights: points that lie on one line say nothing
of the other directions."""
_MOST_SLOPE = 1.0
"""Most of an exponent beyond that of the work; a kernel that does not grow with a size at all has -1."""


def interpolated(operation: Operation, shape: Shape, times: Mapping[Shape, float]) -> float:
    """Return the time of `shape`, in the unit of `times`.

    Args:
        operation: what is computed, which says how work grows with the sizes.
        shape: sizes; any.
        times: by measured shape, at least one, all positive.
    """
    if shape in times:
        return times[shape]
    points = np.log(np.array(list(times), np.float64)) - np.log(np.array(shape, np.float64))
    values = np.array([math.log(time / work(operation, at)) for at, time in times.items()])
    distance = np.sqrt((points**2).sum(1))
    weights = (distance / distance.min()) ** -_POWER
    design = np.column_stack([np.ones(len(values)), points])
    ridge = np.diag([0.0] + [_RIDGE * float(weights.sum())] * points.shape[1])
    mean = float((weights * values).sum() / weights.sum())
    solved = np.linalg.lstsq(
        design.T @ (weights[:, None] * design) + ridge, design.T @ (weights * (values - mean)), rcond=None
    )[0]
    slopes = np.clip(solved[1:], -_MOST_SLOPE, _MOST_SLOPE)
    level = mean + float((weights * (values - mean - points @ slopes)).sum() / weights.sum())
    return math.exp(level) * work(operation, shape)
