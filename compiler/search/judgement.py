# SPDX-License-Identifier: Apache-2.0
"""Whether a metric fell by more than it may: a paired bootstrap interval of the drop, not a point estimate.

Both models are scored on the same samples, so the differences are resampled, not the scores: what makes a
sample hard for both cancels out. The ends are percentiles of the resampled mean, corrected for its bias and
skewness (BCa; Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 14.3): errors are rare,
so that plain percentiles would take too large a drop for kept nearly twice as often as they say.

Resampling knows no loss that it has not seen. Where no sample lost anything, the upper end is that of the
"rule of three" instead (Hanley and Lippman-Hand, JAMA 249(13), 1983): with confidence c a share of at most
-ln(1 - c) / n of all samples loses, each taken to lose as much as the largest score.
"""

from __future__ import annotations

import enum
import math
import statistics
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from splitfold.compiler.errors import EvaluationError
from splitfold.compiler.search.scores import Scores

__all__ = ["Decision", "Judgement", "drop_interval", "judge"]

RESAMPLES = 4000
_AT_ONCE = 500
_MOST_SAMPLES = 10**9
_ROUNDING = 1e-9


class Decision(enum.Enum):
    """What can be said of a drop."""

    KEPT = "kept"
    """It is within the limit: the whole interval is."""
    BROKEN = "broken"
    """It is beyond the limit: the whole interval is, or the model cannot be judged."""
    UNDECIDED = "undecided"
    """The limit lies in the interval."""


@dataclass(frozen=True)
class Judgement:
    """A model's drop, held against a limit.

    Attributes:
        metric: the user's metric; NaN where there is none.
        drop: that of the original less this one's.
        decision: what can be said.
        interval: ends of the drop, each with the confidence asked for; None where the metric is one number.
        more: how many samples more would probably decide; None where it is decided, or where no number would.
        reason: why the model cannot be judged; empty where it was.
    """

    metric: float
    drop: float
    decision: Decision
    interval: tuple[float, float] | None = None
    more: int | None = None
    reason: str = ""

    @staticmethod
    def without(reason: str) -> Judgement:
        """Return the judgement on a model that cannot be taken whatever its metric."""
        return Judgement(math.nan, math.nan, Decision.BROKEN, reason=reason)

    @property
    def kept(self) -> bool:
        """Whether the drop is within the limit."""
        return self.decision is Decision.KEPT

    def __str__(self) -> str:
        if self.reason:
            return f"{self.decision.value}: {self.reason}"
        ends = "" if self.interval is None else f" ({self.interval[0]:.4g} to {self.interval[1]:.4g})"
        return f"metric {self.metric:.6g}, drop {self.drop:.4g}{ends}: {self.decision.value}{self._samples()}"

    def _samples(self) -> str:
        if self.decision is not Decision.UNDECIDED:
            return ""
        if self.more is None:
            return ", and no number of samples would decide"
        return f", about {self.more:,} more samples would decide"


def judge(
    original: Scores, found: Scores, max_drop: float, *, confidence: float = 0.95, seed: int = 0
) -> Judgement:
    """Hold the drop from `original` to `found` against `max_drop`.

    Args:
        original: scores of the model before; finite.
        found: of the model after, on the same samples in the same order.
        max_drop: what the metric may lose.
        confidence: of each end of the interval by itself, 0.5 to 1.
        seed: of the resampling.

    Raises:
        EvaluationError: the two are not scores of the same number of samples.
    """
    _check_paired(original, found)
    if found.fault:
        return Judgement.without(found.fault)
    metric, drop = found.metric, original.metric - found.metric
    limit = max_drop + _ROUNDING * max(abs(original.metric), abs(metric))
    if not original.per_sample or len(original.values) < 2:
        return Judgement(metric, drop, Decision.KEPT if drop <= limit else Decision.BROKEN)
    low, high = drop_interval(original.values, found.values, confidence=confidence, seed=seed)
    if high <= limit:
        return Judgement(metric, drop, Decision.KEPT, (low, high))
    if low > limit:
        return Judgement(metric, drop, Decision.BROKEN, (low, high))
    more = _more(original.values, found.values, max_drop, confidence)
    return Judgement(metric, drop, Decision.UNDECIDED, (low, high), more)


def _check_paired(original: Scores, found: Scores) -> None:
    if original.per_sample != found.per_sample or len(original.values) != len(found.values):
        counts = [
            f"{len(scores.values)} scores" if scores.per_sample else "one number"
            for scores in (original, found)
        ]
        raise EvaluationError(
            f"evaluate returned {counts[0]} for the original model and {counts[1]} for another one: it must "
            "judge the same samples each time, in the same order."
        )


def drop_interval(
    before: npt.NDArray[np.float64], after: npt.NDArray[np.float64], *, confidence: float, seed: int = 0
) -> tuple[float, float]:
    """Return both ends of the mean of `before` - `after`, each with `confidence`.

    Args:
        before: float64 [samples], at least two.
        after: of the same samples.
        confidence: 0.5 to 1.
        seed: of the resampling.
    """
    lost = before - after
    values, counts = np.unique(lost, return_counts=True)
    rng, size, shares = np.random.default_rng(seed), len(lost), counts / len(lost)
    # drawing samples with replacement is drawing how often each value comes
    means = np.concatenate(
        [rng.multinomial(size, shares, _AT_ONCE) @ values / size for _ in range(0, RESAMPLES, _AT_ONCE)]
    )
    levels = [_corrected(level, means, lost) for level in (1 - confidence, confidence)]
    low, high = np.quantile(means, levels)
    return float(low), max(float(high), _unseen(before, lost, confidence))


def _corrected(level: float, means: npt.NDArray[np.float64], lost: npt.NDArray[np.float64]) -> float:
    """Return which percentile of the resampled means stands for `level` (equations 14.10, 14.14, 14.15)."""
    away = lost - lost.mean()
    spread = float(np.square(away).sum())
    if spread == 0:
        return level
    normal, center = statistics.NormalDist(), float(lost.mean())
    fuzz = _ROUNDING * max(abs(center), float(np.abs(lost).max()))
    below = float((means < center - fuzz).mean() + (np.abs(means - center) <= fuzz).mean() / 2)
    bias = normal.inv_cdf(min(max(below, 1 / len(means)), 1 - 1 / len(means)))
    acceleration = float((away**3).sum()) / (6 * spread**1.5)
    moved = bias + normal.inv_cdf(level)
    return normal.cdf(bias + moved / max(1 - acceleration * moved, _ROUNDING))


def _unseen(before: npt.NDArray[np.float64], lost: npt.NDArray[np.float64], confidence: float) -> float:
    """Return the upper end where no sample lost anything, else -inf."""
    if (lost > 0).any():
        return -math.inf
    return float(lost.mean()) + _worst(before, confidence) / len(lost)


def _worst(before: npt.NDArray[np.float64], confidence: float) -> float:
    return -math.log(1 - confidence) * float(np.abs(before).max())


def _more(
    before: npt.NDArray[np.float64], after: npt.NDArray[np.float64], max_drop: float, confidence: float
) -> int | None:
    """Return how many samples more would decide if they were like those seen, in normal approximation."""
    lost = before - after
    count, margin = len(lost), abs(max_drop - float(lost.mean()))
    if margin == 0:
        return None
    wanted = (statistics.NormalDist().inv_cdf(confidence) * float(lost.std(ddof=1)) / margin) ** 2
    if not (lost > 0).any():
        wanted = max(wanted, _worst(before, confidence) / margin)
    return max(1, math.ceil(wanted) - count) if wanted < _MOST_SAMPLES else None
