# SPDX-License-Identifier: Apache-2.0
"""The knapsack against brute force, the program under several budgets, and the front."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfold.passes.allocate import pareto_front
from splitfold.passes.milp import choose_within
from splitfold.runtime.errors import UnsupportedError

_LOSS = st.floats(0, 1, allow_nan=False, width=32)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[float]], list[list[int]], list[list[int]]]:
    """Return losses and two kinds of costs: up to five layers of up to four choices."""
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    losses = [draw(st.lists(_LOSS, min_size=n, max_size=n)) for n in counts]
    sizes = [draw(st.lists(st.integers(0, 40), min_size=n, max_size=n)) for n in counts]
    times = [draw(st.lists(st.integers(-9, 9), min_size=n, max_size=n)) for n in counts]
    return losses, sizes, times


def total(rows: list[list[float]] | list[list[int]], choices: tuple[int, ...]) -> float:
    return math.fsum(row[choice] for row, choice in zip(rows, choices, strict=True))


def everything(rows: list[list[float]]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(row)) for row in rows)))


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(-5, 200))
def test_knapsack_is_as_good_as_brute_force(
    problem: tuple[list[list[float]], list[list[int]], list[list[int]]], budget: int
) -> None:
    losses, sizes, _ = problem
    fitting = [total(losses, picked) for picked in everything(losses) if total(sizes, picked) <= budget]
    found = pareto_front(losses, sizes).within(budget)
    assert (found is None) == (not fitting)
    if found is not None:
        assert found.size <= budget
        assert found.size == total(sizes, found.choices)
        assert found.loss == pytest.approx(min(fitting), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_front_is_all_that_nothing_beats(
    problem: tuple[list[list[float]], list[list[int]], list[list[int]]],
) -> None:
    losses, sizes, _ = problem
    front = pareto_front(losses, sizes)
    assert front.quantum == 1
    assert (np.diff(front.sizes) > 0).all()
    assert (np.diff(front.losses) < 0).all()
    best: dict[int, float] = {}
    for picked in everything(losses):
        size = int(total(sizes, picked))
        best[size] = min(best.get(size, math.inf), total(losses, picked))
    for position in range(len(front)):
        at = front.selection(position)
        assert at.size == front.sizes[position]
        assert at.loss == pytest.approx(
            min(loss for size, loss in best.items() if size <= at.size), abs=1e-12
        )


@settings(max_examples=40, deadline=None)
@given(problems(), st.integers(0, 150))
def test_program_under_one_budget_is_the_knapsack(
    problem: tuple[list[list[float]], list[list[int]], list[list[int]]], budget: int
) -> None:
    losses, sizes, _ = problem
    exact, program = pareto_front(losses, sizes).within(budget), choose_within(losses, [sizes], [budget])
    assert (exact is None) == (program is None)
    if exact is not None and program is not None:
        assert total(sizes, program) <= budget
        assert total(losses, program) == pytest.approx(exact.loss, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(problems(), st.integers(0, 150), st.integers(-20, 20))
def test_program_under_two_budgets_is_as_good_as_brute_force(
    problem: tuple[list[list[float]], list[list[int]], list[list[int]]], size: int, time: int
) -> None:
    losses, sizes, times = problem
    fitting = [
        total(losses, picked)
        for picked in everything(losses)
        if total(sizes, picked) <= size and total(times, picked) <= time
    ]
    found = choose_within(losses, [sizes, times], [size, time])
    assert (found is None) == (not fitting)
    if found is not None:
        assert total(sizes, found) <= size
        assert total(times, found) <= time
        assert total(losses, found) == pytest.approx(min(fitting), abs=1e-6)


def test_a_budget_missed_by_less_than_the_solver_sees_is_missed() -> None:
    """One byte over 10^9 lies within the solver's tolerance: it is refused all the same."""
    losses, sizes = [[1.0, 0.0], [1.0, 0.0]], [[0, 600_000_000], [0, 400_000_001]]
    assert choose_within(losses, [sizes], [1_000_000_000]) in ((1, 0), (0, 1))
    assert choose_within(losses, [sizes], [1_000_000_001]) == (1, 1)


def test_too_many_states_are_rounded_up_and_never_over_the_budget() -> None:
    random = np.random.default_rng(0)
    losses = [sorted(random.random(4).tolist(), reverse=True) for _ in range(14)]
    sizes = [sorted(random.integers(1, 10**6, 4).tolist()) for _ in range(14)]
    exact, coarse = pareto_front(losses, sizes), pareto_front(losses, sizes, states=50)
    assert exact.quantum == 1
    assert coarse.quantum > 1
    for position in range(len(coarse)):
        assert coarse.selection(position).size <= coarse.sizes[position]
    budget = int(sum(row[2] for row in sizes))
    near, best = coarse.within(budget), exact.within(budget)
    safe = exact.within(budget - len(sizes) * coarse.quantum)  # fits with every size rounded up, too
    assert near is not None
    assert best is not None
    assert safe is not None
    assert near.size <= budget
    assert best.loss <= near.loss <= safe.loss


def test_infinite_losses_are_not_taken() -> None:
    front = pareto_front([[math.inf, 1.0], [0.5, math.inf]], [[1, 8], [2, 1]])
    assert front.selection(0).choices == (1, 0)
    assert choose_within([[math.inf, 1.0], [0.5, math.inf]], [[[1, 8], [2, 1]]], [10]) == (1, 0)


@pytest.mark.parametrize(
    ("losses", "sizes", "words"),
    [
        ([[1.0]], [[1, 2]], "differ in shape"),
        ([[math.nan, 1.0]], [[1, 2]], "is NaN"),
        ([[math.inf]], [[1]], "no choice of finite loss"),
    ],
)
def test_what_makes_no_problem_is_refused(
    losses: list[list[float]], sizes: list[list[int]], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        pareto_front(losses, sizes)


def test_no_layer_has_the_empty_plan() -> None:
    assert pareto_front([], []).selection(0).choices == ()
    assert choose_within([], [[]], [0]) == ()


def test_several_budgets_without_scipy_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UnsupportedError, match="pip install scipy, or give one budget"):
        choose_within([[1.0]], [[[1]], [[2]]], [3, 3])
