# SPDX-License-Identifier: Apache-2.0
"""What a plan may cost: limits in bits a weight, megabytes or milliseconds."""

from __future__ import annotations

import enum
import math
import re
from dataclasses import dataclass
from typing import ClassVar

from splitfold.passes.errors import SpecError
from splitfold.passes.worded import Worded
from splitfold.runtime.errors import did_you_mean

__all__ = ["Limit", "Unit"]

_FORM = re.compile(r"^(?P<amount>[0-9]+(\.[0-9]*)?(e-?[0-9]+)?)(?P<unit>[A-Za-z-]+)$")


class Unit(enum.Enum):
    """In what a limit is counted."""

    BITS = "bits"
    """Bits a weight as stored, mean over all layers of the plan: codes, scales, zero points and padding."""
    CODE_BITS = "code-bits"
    """Bits of a weight's code alone, mean over all weights of the plan: as papers count."""
    MEGABYTES = "MB"
    """10^6 bytes of all initializers of the model, those that no choice changes included."""
    MILLISECONDS = "ms"
    """Of one run, as measured."""


@dataclass(frozen=True)
class Limit(Worded):
    """The most that a plan may cost in one unit; text form ``4bits``, ``4code-bits``, ``12.5MB``, ``3ms``."""

    described: ClassVar[str] = "a limit such as 4.5bits, 4code-bits, 12MB, 3ms"

    amount: float
    unit: Unit

    def __post_init__(self) -> None:
        if not (math.isfinite(self.amount) and self.amount > 0):
            raise ValueError(f"a budget is a positive number, not {self.amount}.")

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Return the limit of a text form.

        Raises:
            SpecError: no number, or an unknown unit.
        """
        match = _FORM.match(text.strip())
        units = {unit.value.lower(): unit for unit in Unit}
        words = [unit.value for unit in Unit]
        if match is None:
            raise SpecError(
                f"cannot read the budget '{text.strip()}': write {', '.join('4' + w for w in words)}."
            )
        if match["unit"].lower() not in units:
            near = did_you_mean(match["unit"], words)
            raise SpecError(
                f"budget '{text.strip()}': unknown unit '{match['unit']}'.{near} Known: {', '.join(words)}."
            )
        try:
            return cls(float(match["amount"]), units[match["unit"].lower()])
        except ValueError as error:
            raise SpecError(f"budget '{text.strip()}': {error}") from error

    def __str__(self) -> str:
        return f"{self.amount:.10g}{self.unit.value}"
