# SPDX-License-Identifier: Apache-2.0
"""The paired bootstrap: against SciPy, by its error rate, and by what it says of more samples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from splitfold.compiler.errors import EvaluationError
from splitfold.compiler.search.judgement import Decision, drop_interval, judge
from splitfold.compiler.search.scores import Scores, read_scores

RNG = np.random.default_rng(5)


def scores(values: object) -> Scores:
    return read_scores(values, "a model")


@pytest.mark.parametrize("kind", ["right or wrong", "skewed", "even"])
def test_interval_is_that_of_scipy(kind: str) -> None:
    stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed")
    before = (RNG.random(400) < 0.9).astype(float)
    after = np.where(RNG.random(400) < 0.1, 1 - before, before)
    if kind != "right or wrong":
        before = RNG.exponential(1, 60) ** 2 if kind == "skewed" else RNG.normal(0, 1, 60)
        after = np.zeros(60)
    found = drop_interval(before, after, confidence=0.95)
    known = stats.bootstrap(
        (before - after,), np.mean, confidence_level=0.9, n_resamples=20_000, method="BCa", rng=1
    ).confidence_interval
    error = np.std(before - after) / math.sqrt(len(before))
    step = 1 / 400 if kind == "right or wrong" else 0  # what one sample more or less makes
    np.testing.assert_allclose(found, known, atol=0.15 * error + step)


def test_what_both_find_hard_cancels() -> None:
    hard = RNG.normal(0, 10, 300)
    low, high = drop_interval(hard, hard - 0.01 + RNG.normal(0, 0.001, 300), confidence=0.95)
    assert 0.0098 < low < 0.01 < high < 0.0102
    shuffled = RNG.permutation(hard) - 0.01
    low, high = drop_interval(hard, shuffled, confidence=0.95)
    assert high - low > 1


def test_a_drop_at_the_limit_is_taken_for_kept_no_more_often_than_said() -> None:
    kept = 0
    for trial in range(300):
        rng = np.random.default_rng(trial)
        before = np.ones(500)
        after = (rng.random(500) >= 0.05).astype(float)  # loses 0.05 on all samples there are
        kept += judge(scores(before), scores(after), 0.05, confidence=0.95).kept
    assert 0 < kept <= 300 * 0.07


def test_nothing_lost_yet_is_not_nothing_to_lose() -> None:
    before = (RNG.random(200) < 0.8).astype(float)
    found = judge(scores(before), scores(before), 0.01)
    assert found.decision is Decision.UNDECIDED
    assert found.interval is not None
    assert found.interval[1] == pytest.approx(-math.log(0.05) / 200)
    assert found.more == math.ceil(-math.log(0.05) / 0.01) - 200 == 100
    assert judge(scores(np.tile(before, 2)), scores(np.tile(before, 2)), 0.01).kept


def test_how_many_more_samples_is_the_normal_approximation_and_enough() -> None:
    lost = np.where(np.arange(500) % 50 == 0, 1.0, 0.0)  # 0.02
    before = np.ones(500)
    found = judge(scores(before), scores(before - lost), 0.025)
    assert found.decision is Decision.UNDECIDED
    deviation = math.sqrt(0.02 * 0.98 * 500 / 499)
    assert found.more == math.ceil((1.6448536 * deviation / 0.005) ** 2) - 500
    times = math.ceil((500 + found.more) / 500) + 1
    many = np.tile(lost, times)
    assert judge(scores(np.ones(len(many))), scores(1 - many), 0.025).kept


def test_decisions() -> None:
    before = np.ones(1000)
    lost = np.zeros(1000)
    lost[:100] = 1
    assert judge(scores(before), scores(before - lost), 0.05).decision is Decision.BROKEN
    assert judge(scores(before), scores(before - lost), 0.2).decision is Decision.KEPT
    doubtful = judge(scores(before), scores(before - lost), 0.1)
    assert doubtful.decision is Decision.UNDECIDED
    assert doubtful.more is None
    assert "no number of samples would decide" in str(doubtful)
    assert judge(scores(before), scores(before - lost), 0.1, seed=3) == judge(
        scores(before), scores(before - lost), 0.1, seed=3
    )


def test_one_number_has_no_interval() -> None:
    found = judge(scores(0.91), scores(0.9061), 0.005)
    assert found.kept
    assert found.interval is None
    assert judge(scores(0.91), scores(0.90), 0.005).decision is Decision.BROKEN
    assert judge(scores([0.91]), scores([0.907]), 0.005).interval is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("high", "returned a str for a model"),
        (None, "returned a NoneType"),
        ({"accuracy": 0.9}, "returned a dict"),
        (np.zeros((3, 2)), r"returned a ndarray of shape \[3, 2\]"),
        ([0.1, "x"], "returned a list"),
        ([1.0, [2.0]], "returned a list"),
        (1 + 2j, "returned a complex"),
        ([], "no score"),
    ],
)
def test_what_is_no_score_is_refused(value: object, words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        scores(value)


def test_scores_of_other_samples_are_refused() -> None:
    with pytest.raises(EvaluationError, match="3 scores for the original model and 2 scores"):
        judge(scores([1.0, 1, 1]), scores([1.0, 1]), 0.1)
    with pytest.raises(EvaluationError, match="3 scores for the original model and one number"):
        judge(scores([1.0, 1, 1]), scores(1.0), 0.1)


def test_nan_breaks_a_model() -> None:
    found = judge(scores([1.0, 1, 1]), scores([1.0, math.nan, 1]), 0.1)
    assert found.decision is Decision.BROKEN
    assert found.reason == "evaluate returned NaN for 1 of 3 samples (the first: 1)"
    assert scores([True, False]).metric == 0.5
    assert scores(np.float32(math.inf)).fault == "evaluate returned inf"
