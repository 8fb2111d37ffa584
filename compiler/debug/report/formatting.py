# SPDX-License-Identifier: Apache-2.0
"""Numbers as a reader wants them: with units, few digits, and words for what is no number."""

from __future__ import annotations

import math

from splitfold.runtime.compare import Deviation

__all__ = ["byte_text", "count_text", "decibel_text", "decibels", "finite", "second_text", "share", "short"]


def finite(number: float | None) -> float | None:
    """Return `number`, or None where it is infinite or undefined."""
    return number if number is not None and math.isfinite(number) else None


def decibels(found: Deviation) -> float | None:
    """Return the SQNR to a hundredth of a decibel, or None where it is infinite."""
    return None if not math.isfinite(found.sqnr_db) else round(found.sqnr_db, 2)


def byte_text(size: float | None) -> str:
    """Return bytes as B, kB, MB or GB (powers of 1000)."""
    if size is None:
        return "–"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size) >= factor:
            return f"{short(size / factor)} {unit}"
    return f"{size:.0f} B"


def short(number: float | None) -> str:
    """Return three significant digits, without an exponent where it can be read without."""
    if number is None:
        return "–"
    if not math.isfinite(number):
        return "∞" if number > 0 else "−∞" if number < 0 else "NaN"
    if number == 0:
        return "0"
    size = abs(number)
    if not 1e-4 <= size < 1e6:
        return f"{number:.2e}".replace("-", "−")
    digits = max(0, 2 - math.floor(math.log10(size)))
    return f"{number:,.{digits}f}".replace("-", "−").replace(",", "\N{NARROW NO-BREAK SPACE}")


def count_text(number: int | None) -> str:
    """Return a count with thin spaces between thousands."""
    return "–" if number is None else f"{number:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def decibel_text(number: float | None, *, equal: bool = False) -> str:
    """Return decibels with one digit; ``equal`` for what does not differ."""
    if equal:
        return "equal"
    return "–" if number is None else f"{number:.1f}".replace("-", "−")


def second_text(seconds: float | None) -> str:
    """Return seconds, or milliseconds below one."""
    if seconds is None:
        return "–"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def share(part: float, whole: float) -> str:
    """Return a percentage."""
    return f"{100 * part / whole:.0f} %" if whole else "–"
