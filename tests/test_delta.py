# SPDX-License-Identifier: Apache-2.0
"""Delta debugging: the smallest part for which a test holds."""

from __future__ import annotations

import math
import random

import pytest

from splitfold.compiler.debug.delta import minimize


@pytest.mark.parametrize("seed", range(30))
def test_finds_what_is_needed_in_few_tests(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, 200)
    needed = set(draw.sample(range(count), min(count, draw.randint(1, 4))))
    found = minimize(range(count), lambda part: needed <= set(part))
    assert set(found.items) == needed
    assert found.items == tuple(sorted(found.items))
    assert found.minimal
    assert found.tests <= 4 * len(needed) * (math.log2(count) + 3)


@pytest.mark.parametrize("seed", range(20))
def test_no_item_can_go_where_the_test_is_not_monotone(seed: int) -> None:
    draw = random.Random(seed)
    verdicts: dict[tuple[int, ...], bool] = {}

    def holds(part: tuple[int, ...]) -> bool:
        assert part not in verdicts, "a part was tested twice"
        verdicts[part] = len(part) == 12 or (len(part) > 0 and draw.random() < 0.4)
        return verdicts[part]

    found = minimize(range(12), holds)
    assert verdicts[found.items]
    assert found.tests == len(verdicts)
    for place in range(len(found.items)):
        assert not verdicts[found.items[:place] + found.items[place + 1 :]]


def test_equal_items_are_told_apart_by_place() -> None:
    assert minimize("abab", lambda part: part.count("b") == 2).items == ("b", "b")


def test_a_test_that_holds_of_nothing_or_never() -> None:
    assert minimize([1, 2], lambda part: True).items == ()
    found = minimize([1, 2], lambda part: False)
    assert (found.items, found.holds, found.minimal, found.tests) == ((1, 2), False, False, 1)
    assert minimize([], lambda part: True).items == ()


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8, 13])
def test_the_limit_is_kept_and_said(limit: int) -> None:
    calls: list[tuple[int, ...]] = []

    def holds(part: tuple[int, ...]) -> bool:
        calls.append(part)
        return {7, 40, 80} <= set(part)

    found = minimize(range(100), holds, limit=limit)
    assert len(calls) == found.tests == limit
    assert not found.minimal
    assert found.holds
    assert {7, 40, 80} <= set(found.items)
    with pytest.raises(ValueError, match="limit is 0"):
        minimize([1], holds, limit=0)


def test_the_front_is_tried_first() -> None:
    assert (
        minimize(range(64), lambda part: 0 in part).tests < minimize(range(64), lambda part: 63 in part).tests
    )
