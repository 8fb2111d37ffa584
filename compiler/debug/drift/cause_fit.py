# SPDX-License-Identifier: Apache-2.0
"""Causes: the compiled value is the reference times a factor, plus a constant for each channel, or both."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from splitfold.compiler.debug.drift.sums import ordinary
from splitfold.runtime.feeds import Array

__all__ = ["fit_note"]

_LEFT = 0.2
"""Share of the difference, as L2 norm, that may be left where a fit is named as its cause."""
_ROWS = 8
"""Elements a channel below which a constant for each channel fits too easily."""
_LOST = 0.2
"""Factor below which a value is not a scaled one: it has lost what varies in the reference."""
_Floats = npt.NDArray[np.float64]


def fit_note(reference: Array, actual: Array) -> str:
    """Return words on a fit that explains how `actual` differs from `reference`, or an empty text."""
    if reference.shape != actual.shape or reference.dtype.kind != "f" or reference.size < 2 * _ROWS:
        return ""
    if not (ordinary(reference) & ordinary(actual)).all():
        return ""
    x, y = reference.astype(np.float64), actual.astype(np.float64)
    allowed = _LEFT * float(np.linalg.norm(y - x))
    if not allowed:
        return ""
    factor = float(np.vdot(x, y) / np.vdot(x, x)) if x.any() else 0.0
    if not y.any():
        return "it is all zeros"
    if float(np.linalg.norm(y - factor * x)) < allowed:
        return f"it is {factor:.4g} times the reference"
    axes = [-1] if x.ndim == 2 else [-1, 1]
    found = [note for axis in axes if x.ndim > 1 and (note := _by_channel(x, y, axis, allowed))]
    return found[0] if found else ""


def _by_channel(x: _Floats, y: _Floats, axis: int, allowed: float) -> str:
    x = np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
    y = np.moveaxis(y, axis, -1).reshape(-1, y.shape[axis])
    if x.shape[0] < _ROWS:
        return ""
    if float(np.linalg.norm((y - x) - (y - x).mean(0))) < allowed:
        return "it differs by a constant for each channel: a missing or changed bias?"
    centred, moved = x - x.mean(0), y - y.mean(0)
    factor = float(np.vdot(centred, moved) / np.vdot(centred, centred)) if centred.any() else 1.0
    if float(np.linalg.norm(moved - factor * centred)) < allowed and abs(factor) > _LOST:
        return f"it is {factor:.4g} times the reference but for a constant for each channel: scaled weights?"
    return ""
