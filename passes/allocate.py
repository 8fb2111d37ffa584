# SPDX-License-Identifier: Apache-2.0
"""Multiple-choice knapsack, solved exactly: one choice for each layer, the least loss for every size at once.

Dynamic programming over lists of states that no other state beats in size and loss (Nemhauser and Ullmann,
"Discrete Dynamic Programming and Capital Allocation", Management Science 15(9), 1969): the last list is the
whole Pareto front. Sizes are integers and enter as they are; only where more states than `STATES` are left
are they rounded up, to a multiple of a quantum that the result names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["STATES", "Front", "Selection", "pareto_front"]

STATES = 100_000
"""Most states that are kept exactly."""


@dataclass(frozen=True)
class Selection:
    """One choice for each layer.

    Attributes:
        choices: index of the choice of each layer, in order.
        size: sum of the choices' sizes, exact.
        loss: sum of the choices' losses.
    """

    choices: tuple[int, ...]
    size: int
    loss: float


@dataclass(frozen=True, eq=False)
class Front:
    """All selections that no other beats, from the smallest to the one of least loss.

    Attributes:
        sizes: int64, rising: of each selection; at most `quantum` times the number of layers above the true
            sum, never below.
        losses: float64, falling.
        quantum: what sizes were rounded up to; 1 is exact.
    """

    sizes: npt.NDArray[np.int64]
    losses: npt.NDArray[np.float64]
    quantum: int
    _steps: tuple[_Step, ...]
    _true: tuple[tuple[int, ...], ...]
    _loss: tuple[tuple[float, ...], ...]

    def __len__(self) -> int:
        return len(self.sizes)

    def selection(self, position: int) -> Selection:
        """Return the selection at `position` (negative counts from the end)."""
        at = range(len(self))[position]
        picked: list[int] = []
        for parents, choices in reversed(self._steps):
            picked.append(int(choices[at]))
            at = int(parents[at])
        picked.reverse()
        size = sum(row[choice] for row, choice in zip(self._true, picked, strict=True))
        loss = math.fsum(row[choice] for row, choice in zip(self._loss, picked, strict=True))
        return Selection(tuple(picked), size, loss)

    def within(self, size: int) -> Selection | None:
        """Return the selection of least loss whose size is at most `size`, or None where the smallest is
        larger."""
        position = int(np.searchsorted(self.sizes, size, side="right")) - 1
        return self.selection(position) if position >= 0 else None


def pareto_front(
    losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], *, states: int = STATES
) -> Front:
    """Return the Pareto front of one choice for each layer.

    Args:
        losses: by layer and choice; finite, or infinite where the choice must not be taken.
        sizes: of the same shape, integers, such as bytes; may be negative.
        states: most states that are kept exactly.

    Raises:
        ValueError: a layer without a choice of finite loss, a NaN, or shapes that differ.
    """
    _check(losses, sizes)
    base = [min(row) for row in sizes]
    extra = [[size - least for size in row] for row, least in zip(sizes, base, strict=True)]
    exact = math.gcd(*(size for row in extra for size in row)) or 1
    widest = sum(max(row) for row in extra)
    most = max(states, 2 * len(losses) + 2)
    coarse = -(-widest // (most - 1 - len(losses)))  # rounding up adds one a layer at most
    for quantum in (exact, max(exact, coarse)):
        found = _solve(losses, [[-(-size // quantum) for size in row] for row in extra], most)
        if found is not None:
            break
    else:
        raise AssertionError("the coarse quantum leaves at most `most` sizes")
    total, value, steps = found
    rounded = 1 if quantum == exact else quantum
    given = tuple(tuple(map(float, row)) for row in losses)
    true = tuple(tuple(int(size) for size in row) for row in sizes)
    return Front(total * quantum + sum(base), value, rounded, steps, true, given)


def _check(losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]]) -> None:
    if [len(row) for row in losses] != [len(row) for row in sizes]:
        raise ValueError("losses and sizes differ in shape.")
    for position, row in enumerate(losses):
        if any(math.isnan(loss) for loss in row):
            raise ValueError(f"the loss of a choice of layer {position} is NaN.")
        if not any(math.isfinite(loss) for loss in row):
            raise ValueError(f"layer {position} has no choice of finite loss.")


_Step = tuple[npt.NDArray[np.int32], npt.NDArray[np.int16]]
"""By state: the state before, and the choice taken."""


def _solve(
    losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], states: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], tuple[_Step, ...]] | None:
    """Return sizes and losses of the last states and the steps to them, or None where there are too many."""
    total, value = np.zeros(1, np.int64), np.zeros(1)
    steps = []
    for row, cost in zip(losses, sizes, strict=True):
        total, value, step = _extended(total, value, row, cost)
        if len(total) > states:
            return None
        steps.append(step)
    return total, value, tuple(steps)


def _extended(
    total: npt.NDArray[np.int64],
    value: npt.NDArray[np.float64],
    losses: Sequence[float],
    sizes: Sequence[int],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], _Step]:
    """Return the unbeaten states after one more layer."""
    finite = [choice for choice, loss in enumerate(losses) if math.isfinite(loss)]
    larger = np.concatenate([total + sizes[choice] for choice in finite])
    worse = np.concatenate([value + losses[choice] for choice in finite])
    order = np.lexsort((worse, larger))  # stable: the earlier choice wins a tie
    sorted_losses = worse[order]
    best_before = np.concatenate([[np.inf], np.minimum.accumulate(sorted_losses)[:-1]])
    kept = order[sorted_losses < best_before]
    choices, parents = np.divmod(kept, len(total))
    step = parents.astype(np.int32), np.array(finite, np.int16)[choices]
    return larger[kept], worse[kept], step
