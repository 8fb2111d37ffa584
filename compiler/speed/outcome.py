# SPDX-License-Identifier: Apache-2.0
"""What the comparison of speed came to."""

from __future__ import annotations

from dataclasses import dataclass

from splitfold.compiler.speed.stopwatch import LayerTime
from splitfold.runtime.race import Race

__all__ = ["Speed"]


@dataclass(frozen=True)
class Speed:
    """How fast the result of a compilation is beside the model that it was given, on its example inputs.

    Attributes:
        race: the two; None where nothing was measured.
        first: the same before any layer went back to float; None where none had to.
        slow: the layers that made it slower, the worst first.
        put_back: layers that went back to float because of that.
        in_int8: layers that went to dynamic int8, which is faster than blocks at many rows.
        left_out: passes (text form) that were left out because of that.
        note: why nothing was measured, or why a slower result stays as it is; else empty.
    """

    race: Race | None
    first: Race | None = None
    slow: tuple[LayerTime, ...] = ()
    put_back: tuple[str, ...] = ()
    in_int8: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    note: str = ""

    @property
    def changed(self) -> bool:
        """Whether the result is another one because the first was slower."""
        return bool(self.put_back or self.in_int8 or self.left_out)

    @property
    def statement(self) -> str:
        """All this in one sentence, for people."""
        if self.race is None:
            return f"not measured: {self.note}"
        text = f"{self.race} beside the model as it was given"
        if self.race.turns:
            text += f", between {self.race.low:.2f}x and {self.race.high:.2f}x"
        if self.first is not None and self.changed:
            text += f"; {self.first.ratio:.2f}x before {self._changes()}"
        return f"{text}. {self.note}".removesuffix(" ")

    def _changes(self) -> str:
        parts = []
        if self.in_int8:
            parts.append(f"{len(self.in_int8)} layers went to dynamic int8")
        if self.put_back:
            parts.append(f"{len(self.put_back)} layers went back to float")
        if self.left_out:
            parts.append(f"{len(self.left_out)} passes were left out")
        return ", ".join(parts)
