# SPDX-License-Identifier: Apache-2.0
"""Multiple-choice knapsack under several budgets at once, as a mixed-integer linear program solved by HiGHS;
the only file of the library that imports SciPy, and only when it is asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from splitfold.runtime.errors import UnsupportedError

__all__ = ["choose_within"]

Floats = npt.NDArray[np.float64]

_INFEASIBLE = 2
_CUTS = 50
"""Answers that may be refused because they keep a budget only within the solver's tolerance of 1e-6."""


def choose_within(
    losses: Sequence[Sequence[float]], costs: Sequence[Sequence[Sequence[float]]], budgets: Sequence[float]
) -> tuple[int, ...] | None:
    """Return the choice of each layer with the least sum of losses that keeps every budget, or None where
    nothing does.

    Budgets are kept exactly; the sum of losses is the least to within 1e-6 of the largest loss.

    Args:
        losses: by layer and choice; infinite where the choice must not be taken.
        costs: by budget, layer and choice.
        budgets: the most that each kind of cost may sum up to.

    Raises:
        UnsupportedError: SciPy is not installed.
        RuntimeError: the solver stopped without an answer.
    """
    counts = [len(row) for row in losses]
    if not counts:
        return ()
    flat = np.array([loss for row in losses for loss in row], np.float64)
    rows = [np.array([amount for layer in cost for amount in layer], np.float64) for cost in costs]
    bounds = [_Bound(one, 1, 1) for one in _one_each(counts)]
    for row, budget in zip(rows, budgets, strict=True):
        size = max(float(np.abs(row).max()), abs(budget)) or 1.0
        bounds.append(_Bound(row / size, -math.inf, budget / size))
    for _ in range(_CUTS):
        x = _solved(flat, bounds)
        if x is None:
            return None
        chosen = _picked(x, counts)
        taken = np.zeros(len(flat))
        taken[[start + choice for start, choice in zip(np.cumsum([0, *counts]), chosen, strict=False)]] = 1
        if all(math.fsum(row[taken > 0]) <= budget for row, budget in zip(rows, budgets, strict=True)):
            return chosen
        bounds.append(_Bound(taken, -math.inf, len(counts) - 1))
    raise RuntimeError(f"HiGHS gave {_CUTS} plans that miss a budget by less than its tolerance.")


@dataclass(frozen=True)
class _Bound:
    """low <= row . x <= high."""

    row: Floats
    low: float
    high: float


def _solved(flat: Floats, bounds: Sequence[_Bound]) -> Floats | None:
    """Return the 0-1 vector of the least sum within all bounds, or None where there is none."""
    try:
        from scipy import optimize
    except ImportError as error:
        raise UnsupportedError(
            "several budgets at once are solved by SciPy, which is not installed: pip install scipy, or give "
            "one budget."
        ) from error
    allowed = np.isfinite(flat)
    scale = float(flat[allowed].max(initial=0.0)) or 1.0
    matrix = np.stack([bound.row for bound in bounds])
    found = optimize.milp(
        np.where(allowed, flat / scale, 0.0),
        constraints=optimize.LinearConstraint(
            matrix, [bound.low for bound in bounds], [bound.high for bound in bounds]
        ),
        integrality=np.ones(len(flat)),
        bounds=optimize.Bounds(0, allowed.astype(np.float64)),
        options={"mip_rel_gap": 0.0},
    )
    if found.status == _INFEASIBLE:
        return None
    if found.x is None:
        raise RuntimeError(f"HiGHS found no plan: {found.message}")
    return np.asarray(found.x, np.float64)


def _one_each(counts: Sequence[int]) -> Floats:
    """Return a row a layer, 1 at its own choices."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return np.asarray(owner[None, :] == np.arange(len(counts))[:, None], np.float64)


def _picked(x: Floats, counts: Sequence[int]) -> tuple[int, ...]:
    ends = np.cumsum(counts)
    return tuple(
        int(np.argmax(x[end - count : end])) for count, end in zip(counts, ends.tolist(), strict=True)
    )
