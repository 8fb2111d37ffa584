# SPDX-License-Identifier: Apache-2.0
"""How a budget of weights that may stand apart is shared out among layers: by what they gain for a byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from splitfold.passes.outlier_cuts import Cut

__all__ = ["share_out"]

Key = TypeVar("Key")


def share_out(menus: Mapping[Key, Sequence[Cut]], budget: int, min_gain: float) -> dict[Key, Cut]:
    """Return the cut that each layer gets, of those that it may have.

    What a cut is worth is by how many dB its error lies below that of plain weights of as many bytes, beyond
    `min_gain`. Greedy: time after time the step of the largest worth for a weight that stands apart, from no
    cut or from a smaller one, while it fits.

    Args:
        menus: cuts that pay, by layer.
        budget: weights that may stand apart in all.
        min_gain: in dB; each cut of `menus` gains it.
    """
    chosen: dict[Key, Cut] = {}
    left = budget
    while True:
        steps = [
            (rate, -number, key, cut)
            for number, (key, menu) in enumerate(menus.items())
            for cut in menu
            if _apart(cut) - _apart(chosen.get(key)) <= left
            and (rate := _rate(cut, chosen.get(key), min_gain)) > 0
        ]
        if not steps:
            return chosen
        _, _, key, cut = max(steps, key=lambda step: step[:2])
        left -= _apart(cut) - _apart(chosen.get(key))
        chosen[key] = cut


def _apart(cut: Cut | None) -> int:
    return 0 if cut is None else cut.apart


def _worth(cut: Cut | None, min_gain: float) -> float:
    return 0.0 if cut is None else cut.gain_db - min_gain


def _rate(cut: Cut, held: Cut | None, min_gain: float) -> float:
    """Return what `cut` is worth over `held` (None: unsplit) for a weight more apart; 0 where none is."""
    more = _apart(cut) - _apart(held)
    return (_worth(cut, min_gain) - _worth(held, min_gain)) / more if more > 0 else 0.0
