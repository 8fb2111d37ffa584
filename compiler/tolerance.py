# SPDX-License-Identifier: Apache-2.0
"""How far a compiled model may be from its reference, and how large it may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from splitfold.compiler.errors import BudgetError, VerificationError
from splitfold.passes.errors import Failure, SpecError
from splitfold.runtime.compare import Deviation, worst
from splitfold.runtime.errors import did_you_mean

__all__ = ["Budget", "Tolerance"]

_NAMES = {"cosine": "cosine", "sqnr": "sqnr_db", "max-abs": "max_abs", "top1": "top1"}
"""Limits by their names in the text form."""


def _limit(name: str, value: str) -> float | None:
    if value == "none":
        return None
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise SpecError(f"limit {name}={value} is not a number or none.")
    return number


@dataclass(frozen=True)
class Tolerance:
    """Limits on the deviation of every output; None is no limit.

    Args:
        cosine: least cosine similarity.
        sqnr_db: least signal to quantization noise ratio, in dB.
        max_abs: largest absolute difference.
        top1: least share of rows whose largest element agrees.
        metric_drop: largest loss of the user's metric (absolute; more is better).
    """

    cosine: float | None = 0.9
    sqnr_db: float | None = None
    max_abs: float | None = None
    top1: float | None = None
    metric_drop: float | None = None

    @staticmethod
    def parse(text: str) -> Tolerance:
        """Return the tolerance of a text such as ``cosine=0.99,sqnr=20``; ``cosine=none`` lifts that limit.

        Raises:
            SpecError: an unknown name, or a value that is no number.
        """
        limits: dict[str, float | None] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = (word.strip() for word in item.partition("="))
            if name not in _NAMES:
                raise SpecError(
                    f"unknown limit '{name}'.{did_you_mean(name, _NAMES)} Known: {', '.join(_NAMES)}."
                )
            limits[_NAMES[name]] = _limit(name, value)
        return Tolerance(**limits)

    def check(self, deviations: Mapping[str, Deviation], blame: str) -> None:
        """Raise `VerificationError` for the worst output that is beyond a limit."""
        ranked = sorted(deviations.items(), key=lambda item: item[1].sqnr_db)
        for output, found in ranked:
            if broken := self._broken(found):
                raise VerificationError(
                    f"output '{output}' is further from the reference than the tolerance allows: {broken} "
                    f"({found}). "
                    f"The pass with the largest deviation: {blame or 'none'}. Exclude layers, choose "
                    "another preset, or widen the tolerance.",
                    output=output,
                    deviation=found,
                    blame=blame,
                )

    def _broken(self, found: Deviation) -> str:
        if self.cosine is not None and not found.cosine >= self.cosine:
            return f"cosine {found.cosine:.5f} < {self.cosine:g}"
        if self.sqnr_db is not None and not found.sqnr_db >= self.sqnr_db:
            return f"SQNR {found.sqnr_db:.1f} dB < {self.sqnr_db:g} dB"
        if self.max_abs is not None and not found.max_abs <= self.max_abs:
            return f"largest difference {found.max_abs:.3g} > {self.max_abs:g}"
        if self.top1 is not None and found.top1 is not None and found.top1 < self.top1:
            return f"top-1 agreement {found.top1:.3f} < {self.top1:g}"
        return ""

    def check_metric(self, before: float, after: float) -> None:
        """Raise `VerificationError` where the user's metric fell by more than `metric_drop`."""
        if self.metric_drop is not None and not before - after <= self.metric_drop:
            raise VerificationError(
                f"the metric fell from {before:.6g} to {after:.6g}, by more than metric_drop = "
                f"{self.metric_drop:g}.",
                kind=Failure.METRIC,
            )


@dataclass(frozen=True)
class Budget:
    """What the result may cost, in size and in the user's metric; None is no limit.

    Args:
        megabytes: largest size of all weights, in 10^6 bytes.
        max_drop: what the user's metric may lose, absolute. It makes `compile` search the plans of the
            pipeline's `assign-precision` (default `presets.mixed()`) for the smallest or fastest model that
            keeps it. The best so far comes back in any case, and `Compiled.search` says what it keeps.
    """

    megabytes: float | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("megabytes", self.megabytes), ("max_drop", self.max_drop)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; it is a number from 0 up, or None.")

    def check(self, size: int) -> None:
        """Raise `BudgetError` where `size` (bytes) is over the budget."""
        if self.megabytes is not None and size > self.megabytes * 1e6:
            raise BudgetError(
                f"the result has {size / 1e6:.2f} MB of weights, over the budget of {self.megabytes:g} MB."
            )


def worst_text(deviations: Mapping[str, Deviation]) -> str:
    """Return the worst output and its deviation as text."""
    found = worst(deviations)
    return f"{found[0]}: {found[1]}" if found else "no output"
