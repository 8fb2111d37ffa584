# SPDX-License-Identifier: Apache-2.0
"""Delta debugging: the smallest part of a sequence that a test still holds for.

`minimize` is ddmin of Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", IEEE TSE
28(2), 2002.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Minimum", "minimize"]

T = TypeVar("T")


@dataclass(frozen=True)
class Minimum(Generic[T]):
    """What `minimize` found.

    Attributes:
        items: the smallest part found that the test holds for, in the given order; all of the sequence where
            the test does not hold for it.
        tests: calls of the test; a part that was met before is not tested again.
        minimal: whether it is known that the test fails for `items` without any one of them (1-minimal);
            False where the limit stopped the search before, or the test does not hold at all.
        holds: whether the test holds for `items`.
    """

    items: tuple[T, ...]
    tests: int
    minimal: bool
    holds: bool = True


def minimize(items: Sequence[T], holds: Callable[[tuple[T, ...]], bool], *, limit: int = 1000) -> Minimum[T]:
    """Return a small part of `items` that `holds` is still true of.

    The order of `items` is a hint: a part towards the front is tried before one towards the back, so put what
    is most suspicious first. With k items to be found of n, a search takes about 2 k log2(n) tests.

    Args:
        items: any sequence; equal items are told apart by their place.
        holds: the test, of a subsequence of `items` in their order. It is asked about the empty sequence too.
        limit: calls of `holds` at most, at least 1.

    Raises:
        ValueError: `limit` is below 1. What `holds` raises comes through.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}: at least one test is needed.")
    search = _Search(items, holds, limit)
    every = tuple(range(len(items)))
    try:
        if not search.test(every):
            return Minimum(tuple(items), search.tests, minimal=False, holds=False)
        search.best = every
        if search.test(()):
            return Minimum((), search.tests, minimal=True)
        search.reduce()
    except _LimitError:
        return Minimum(search.chosen(search.best), search.tests, minimal=False)
    return Minimum(search.chosen(search.best), search.tests, minimal=True)


class _LimitError(Exception):
    """No further test may be run."""


class _Search(Generic[T]):
    def __init__(self, items: Sequence[T], holds: Callable[[tuple[T, ...]], bool], limit: int) -> None:
        self._items = items
        self._holds = holds
        self._limit = limit
        self._known: dict[tuple[int, ...], bool] = {}
        self.best: tuple[int, ...] = ()

    @property
    def tests(self) -> int:
        return len(self._known)

    def chosen(self, places: tuple[int, ...]) -> tuple[T, ...]:
        return tuple(self._items[place] for place in places)

    def test(self, places: tuple[int, ...]) -> bool:
        if places not in self._known:
            if self.tests >= self._limit:
                raise _LimitError
            self._known[places] = self._holds(self.chosen(places))
        return self._known[places]

    def reduce(self) -> None:
        """Shrink `best`, of which the test holds, until no single item can go."""
        parts = 2
        while len(self.best) >= 2:
            chunks = _split(self.best, parts)
            if (found := self._first(chunks)) is not None:
                self.best, parts = found, 2
            elif parts > 2 and (found := self._first(_complements(chunks))) is not None:
                self.best, parts = found, max(parts - 1, 2)
            elif parts < len(self.best):
                parts = min(2 * parts, len(self.best))
            else:
                return

    def _first(self, candidates: list[tuple[int, ...]]) -> tuple[int, ...] | None:
        return next((places for places in candidates if self.test(places)), None)


def _split(places: tuple[int, ...], parts: int) -> list[tuple[int, ...]]:
    """Return `places` in `parts` pieces whose sizes differ by one at most."""
    bounds = [index * len(places) // parts for index in range(parts + 1)]
    return [places[start:end] for start, end in itertools.pairwise(bounds)]


def _complements(chunks: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return what each chunk leaves; what is without the last one, the least suspicious, first."""
    left = [tuple(place for chunk in chunks if chunk is not skip for place in chunk) for skip in chunks]
    return left[::-1]
