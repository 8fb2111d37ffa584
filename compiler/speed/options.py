# SPDX-License-Identifier: Apache-2.0
"""How a compilation sees to it that its result is not slower than what it was given."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from splitfold.compiler.speed.stopwatch import Stopwatch, WallClock

__all__ = ["IfSlower", "SpeedCheck"]


class IfSlower(enum.Enum):
    """What happens where the result is slower than the model was."""

    PRESET = "preset"
    """A preset is repaired: slower layers go to dynamic int8 or back to float until it is not; a pipeline of
    the user's own stays, with a warning."""
    REPAIR = "repair"
    """Any pipeline is repaired."""
    KEEP = "keep"
    """It stays as it is, with a warning."""


@dataclass(frozen=True)
class SpeedCheck:
    """How `compile` compares the result's speed with that of the model that it was given.

    What was found is `Compiled.speed`. Where the result is changed for it, two runs can give two results; the
    manifest's pipeline says what was done, and a replay gives the same bytes.

    Args:
        if_slower: what happens where it is slower.
        seconds: for each comparison; there is one, and one more for each attempt to repair.
        margin: share by which it may be slower before that counts.
        attempts: how often slower layers may be changed before all of them go back to float.
        megabytes: weights (10^6 bytes) beyond which nothing is measured: both models are opened at once.
        stopwatch: what takes the times.
    """

    if_slower: IfSlower = IfSlower.PRESET
    seconds: float = 2.0
    margin: float = 0.01
    attempts: int = 4
    megabytes: float = 1500.0
    stopwatch: Stopwatch = field(default_factory=WallClock)

    def __post_init__(self) -> None:
        if self.seconds <= 0 or not 0 <= self.margin < 1 or self.attempts < 1:
            raise ValueError(
                f"seconds is {self.seconds}, margin {self.margin}, attempts {self.attempts}: seconds is "
                "positive, margin lies in [0, 1), and there is one attempt at least."
            )
