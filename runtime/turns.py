# SPDX-License-Identifier: Apache-2.0
"""Models that are timed together take turns of a few runs, and the order of the turns rotates: what else the
machine does then falls on all of them alike."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["turns"]

_RUNS = 5


def turns(models: int, runs: int) -> Iterator[tuple[int, int]]:
    """Yield (which model, how many timed runs) until each of `models` had `runs`.

    A turn should begin with one run more, untimed, which brings this model's threads and caches back.

    Raises:
        ValueError: `runs` is not positive.
    """
    if runs < 1:
        raise ValueError(f"runs is {runs}; at least one is needed.")
    for turn in range(-(-runs // _RUNS)):
        for offset in range(models):
            yield (turn + offset) % models, min(_RUNS, runs - turn * _RUNS)
