# SPDX-License-Identifier: Apache-2.0
"""The distance of outputs: what counts as equal, and what must never."""

from __future__ import annotations

import math

import numpy as np
import pytest

from splitfold.runtime.compare import deviation, exactness, first_non_finite
from splitfold.runtime.feeds import Array

INF, NAN = np.inf, np.nan


def floats(*values: float) -> Array:
    return np.array(values, np.float32)


@pytest.mark.parametrize("special", [INF, -INF, NAN])
def test_a_special_value_equals_itself_alone(special: float) -> None:
    assert exactness(floats(1, special), floats(1, special), rtol=1e-5).excess == 0
    for other in (0.0, 3e38, -special if special == special else INF):  # NaN is not itself
        assert exactness(floats(1, special), floats(1, other), rtol=1e-5).excess == math.inf
        assert exactness(floats(1, other), floats(1, special), rtol=1e-5).excess == math.inf


def test_another_shape_or_dtype_is_never_equal() -> None:
    assert exactness(floats(1, 2), floats(1), rtol=1).excess == math.inf
    assert exactness(floats(1), np.array([1.0]), rtol=1).excess == math.inf
    assert exactness(np.array(["a"], object), np.array(["b"], object), rtol=1).excess == math.inf
    assert exactness(np.array(["a"], object), np.array(["a"], object), rtol=1).excess == 0


def test_cancellation_is_measured_against_the_whole() -> None:
    reference, moved = floats(1000, 0, -1000), floats(1000, 0.001, -1000)
    assert exactness(reference, moved, rtol=1e-5).excess < 1
    assert exactness(reference, moved, rtol=1e-7).excess > 1
    assert exactness(floats(0, 0), floats(0, 1e-30), rtol=1).excess == math.inf


def test_deviation_by_hand() -> None:
    found = deviation([floats(3, 4)], [floats(3, 4.5)])
    assert found.max_abs == 0.5
    assert found.relative == pytest.approx(0.1)
    assert found.sqnr_db == pytest.approx(20)
    assert found.cosine == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)))
    assert found.top1 == 1.0
    assert deviation([floats(3, 4)], [floats(5, 4)]).top1 == 0.0


def test_deviation_over_pairs_is_that_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    reference, actual = rng.standard_normal((6, 5)), rng.standard_normal((6, 5))
    parts, whole = deviation(np.split(reference, 3), np.split(actual, 3)), deviation([reference], [actual])
    assert parts.sqnr_db == pytest.approx(whole.sqnr_db)
    assert (parts.max_abs, parts.top1) == (whole.max_abs, whole.top1)


def test_a_nan_is_never_a_good_result() -> None:
    found = deviation([floats(1, 2)], [floats(1, NAN)])
    assert not found.max_abs < 1e9
    assert not found.sqnr_db > 0
    assert not found.cosine > 0


def test_first_non_finite() -> None:
    outputs = {"ids": np.array([1]), "good": floats(1), "bad": floats(INF), "worse": floats(NAN)}
    assert first_non_finite(outputs) == "bad"
    assert first_non_finite({"good": floats(1)}) is None
