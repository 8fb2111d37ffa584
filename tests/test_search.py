# SPDX-License-Identifier: Apache-2.0
"""The search for the best model within a drop of a metric: what it finds, when it ends, what it refuses."""

from __future__ import annotations

import functools
import json
import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import joblib
import numpy as np
import pytest
from agreement import Agreement
from encoder import token_batches
from test_assign_precision import planning, timed

from splitfold.compiler.errors import BudgetError, EvaluationError
from splitfold.compiler.planning import Planning
from splitfold.compiler.search.found import Searched, Stop, Trial
from splitfold.compiler.search.judgement import Decision
from splitfold.compiler.search.options import Goal, Search, Unmet
from splitfold.compiler.search.search import search_plan
from splitfold.runtime.model_file import weight_bytes
from splitfold.runtime.session import Session

DROP = 0.02
COARSE = "choices=[w2-b16,w4-b16],signal=uniform,error=bits"


@functools.cache
def metric(*, per_sample: bool = False) -> Agreement:
    feeds = {"ids": np.concatenate([batch["ids"] for batch in token_batches(10, seed=5)])}
    return Agreement.with_model(planning().model, feeds, per_sample=per_sample)


class Log:
    """Observer that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Trial, int, int]] = []

    def after_trial(self, trial: Trial, evaluations: int, limit: int) -> None:
        self.told.append((trial, evaluations, limit))


def after(count: int, what: Callable[[], object]) -> Callable[[Session], float]:
    """Return the metric, with `what` in the place of its result from the `count`-th call on."""
    calls = iter(range(1000))

    def evaluate(session: Session) -> float:
        return what() if next(calls) >= count else metric()(session)  # type: ignore[return-value]

    return evaluate


def raising(error: BaseException) -> object:
    raise error


# What it finds


def test_the_smallest_plan_of_the_front_that_keeps_the_metric() -> None:
    log = Log()
    found = search_plan(planning(), metric(), DROP, search=Search(resolution=0), observers=[log])
    assert found.original == pytest.approx(0, abs=1e-9)
    assert found.met
    assert found.stopped is Stop.FINISHED
    assert metric()(Session(planning().carried_out(found.plan))) == found.metric >= -DROP
    assert len(found.trials) <= math.ceil(math.log2(len(planning().allocation.front))) + 2
    kept = [item.size for item in found.trials if item.judgement.kept]
    broken = [item.size for item in found.trials if not item.judgement.kept]
    assert found.best.size == min(kept) == weight_bytes(planning().carried_out(found.plan))
    assert max(broken) < min(kept)
    assert [trial for trial, _, _ in log.told] == list(found.trials)
    assert log.told[-1][1:] == (len(found.trials) + 1, 20)
    assert "point estimate: evaluate returns no score a sample" in found.statement


def test_scores_of_samples_need_room_for_doubt() -> None:
    point = search_plan(planning(), metric(), DROP, search=Search(resolution=0))
    sure = search_plan(planning(), metric(per_sample=True), DROP, search=Search(resolution=0))
    assert sure.met
    assert sure.best.judgement.interval is not None
    assert sure.best.judgement.interval[1] <= DROP
    assert sure.best.size >= point.best.size
    weights = np.random.default_rng(0).exponential(1, len(metric().reference)) ** 3
    doubt = search_plan(planning(), lambda session: weights * metric(per_sample=True)(session), 6 * DROP)
    doubtful = [item for item in doubt.trials if item.judgement.decision is Decision.UNDECIDED]
    assert doubtful
    assert all(item.size < doubt.best.size for item in doubtful)
    assert "may keep it too" in doubt.statement
    assert "more samples would decide" in doubt.statement


def test_resolution_saves_evaluations() -> None:
    fine = search_plan(planning(), metric(), DROP, search=Search(resolution=0))
    coarse = search_plan(planning(), metric(), DROP, search=Search(resolution=0.1))
    assert len(coarse.trials) < len(fine.trials)
    assert coarse.met
    assert coarse.best.size < 1.3 * fine.best.size


def test_the_fastest_plan() -> None:
    base, allocation = planning(), timed()
    found = search_plan(
        Planning(base.step, base.model, base.context, allocation, base.original),
        metric(),
        DROP,
        search=Search(goal=Goal.FASTEST),
    )
    assert allocation.times is not None
    assert found.best.milliseconds == pytest.approx(
        10 - 0.5 * len(found.plan.layers)
    )  # dynamic int8 everywhere
    assert found.plan.counts() == {"int8-dynamic": 6}
    with pytest.raises(ValueError, match="no times were measured"):
        search_plan(base, metric(), DROP, search=Search(goal=Goal.FASTEST))


def test_megabytes_hold_too() -> None:
    free = search_plan(planning(), metric(), DROP)
    tight = (free.best.size - 400) / 1e6
    found = search_plan(planning(), metric(), DROP, megabytes=tight)
    assert not found.met
    assert found.best.size <= tight * 1e6
    assert search_plan(planning(), metric(), 1.0, megabytes=tight).met
    with pytest.raises(BudgetError, match="in its smallest choice the weights take") as raised:
        search_plan(planning(), metric(), DROP, megabytes=0.001)
    assert raised.value.binds == "0.001MB"
    assert raised.value.reached.endswith(" MB")


# Goals that are not met


def test_the_best_comes_back_also_where_the_goal_is_not_met(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "splitfold"):
        found = search_plan(planning(COARSE), metric(), 1e-9)
    assert not found.met
    assert found.plan.counts() == {"w4-b16": 6}
    assert found.statement.startswith("not met: no model that was tried is within max_drop = 1e-09")
    assert found.statement in caplog.text
    with pytest.raises(BudgetError, match="no plan keeps the metric") as raised:
        search_plan(planning(COARSE), metric(), 1e-9, search=Search(unmet=Unmet.RAISE))
    assert raised.value.binds == "max_drop=1e-09"
    assert float(raised.value.reached) == pytest.approx(found.metric, rel=1e-4)


def test_a_goal_that_is_not_decided_says_how_many_samples_would() -> None:
    found = search_plan(planning(COARSE), metric(per_sample=True), 1e-9)
    assert not found.met
    few = Agreement({"ids": metric().feeds["ids"][:6]}, metric().reference[:6])
    drop = found.best.judgement.drop * 1.05
    found = search_plan(planning(COARSE), few, drop)
    assert found.best.judgement.decision is Decision.UNDECIDED
    assert "not met, as it is not decided" in found.statement
    assert found.best.judgement.more
    assert f"About {found.best.judgement.more:,} more samples would decide" in found.statement


# How it ends


def test_few_evaluations() -> None:
    found = search_plan(planning(), metric(), DROP, search=Search(evaluations=3, resolution=0))
    assert len(found.trials) == 2
    assert found.met
    assert found.stopped is Stop.EVALUATIONS
    assert "ended at its limit of evaluations" in found.statement


def test_little_time() -> None:
    found = search_plan(planning(), metric(), DROP, search=Search(seconds=1e-9, resolution=0))
    assert len(found.trials) == 1
    assert found.stopped is Stop.SECONDS
    assert found.met


def test_an_interrupted_search_returns_the_best_so_far() -> None:
    evaluate = after(3, lambda: raising(KeyboardInterrupt()))
    found = search_plan(planning(), evaluate, DROP, search=Search(resolution=0))
    assert found.stopped is Stop.INTERRUPTED
    assert len(found.trials) == 2
    assert found.met
    assert "interrupted" in found.statement
    with pytest.raises(KeyboardInterrupt):
        search_plan(planning(), after(1, lambda: raising(KeyboardInterrupt())), DROP)


# The user's metric


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (lambda: math.nan, "evaluate returned NaN for the original model"),
        (lambda: math.inf, "evaluate returned inf for the original model"),
        (lambda: "good", "evaluate returned a str for the original model"),
        (lambda: raising(KeyError("label")), "evaluate raised KeyError for the original model: 'label'"),
    ],
)
def test_a_metric_that_cannot_be_used(what: Callable[[], object], words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        search_plan(planning(), after(0, what), DROP)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (lambda: [1.0, 2.0], "one number for the original model and 2 scores for another one"),
        (lambda: None, "returned a NoneType for a plan of"),
        (lambda: raising(ZeroDivisionError("division")), "raised ZeroDivisionError for a plan of"),
    ],
)
def test_a_metric_that_fails_later(what: Callable[[], object], words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        search_plan(planning(), after(2, what), DROP)


def test_a_model_whose_metric_is_nan_is_not_taken() -> None:
    found = search_plan(planning(), after(3, lambda: math.nan), DROP, search=Search(resolution=0))
    broken = [item for item in found.trials if item.judgement.reason]
    assert broken
    assert broken[0].judgement.reason == "evaluate returned NaN"
    assert found.met
    with pytest.raises(BudgetError, match=r"none could be judged\. The first: evaluate returned NaN"):
        search_plan(planning(), after(1, lambda: math.nan), DROP)


@pytest.mark.parametrize("drop", [-0.1, math.nan, math.inf])
def test_a_drop_that_is_none(drop: float) -> None:
    with pytest.raises(ValueError, match="max_drop is"):
        search_plan(planning(), metric(), drop)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"evaluations": 1}, "evaluations is 1"),
        ({"seconds": 0}, "seconds is 0"),
        ({"confidence": 1}, "confidence is 1"),
        ({"resolution": -1}, "resolution is -1"),
        ({"jobs": 0}, "jobs is 0"),
    ],
)
def test_options_that_make_no_search(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Search(**options)  # type: ignore[arg-type]


# Evaluations are kept


def test_a_folder_keeps_evaluations(tmp_path: Path) -> None:
    options = Search(cache=tmp_path / "kept")
    first = search_plan(planning(), metric(per_sample=True), DROP, search=options)
    log = Log()
    second = search_plan(planning(), metric(per_sample=True), DROP, search=options, observers=[log])
    assert all(item.cached for item in second.trials)
    assert [item.judgement for item in second.trials] == [item.judgement for item in first.trials]
    assert {evaluations for _, evaluations, _ in log.told} == {1}  # the original, to see that the folder fits
    assert len(list((tmp_path / "kept").iterdir())) == len(first.trials) + 1


def test_a_folder_of_another_metric_is_not_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = Search(cache=tmp_path)
    search_plan(planning(), metric(), DROP, search=options)
    other = Agreement(metric().feeds, metric().reference + 1, per_sample=False)
    with caplog.at_level(logging.WARNING, "splitfold"):
        found = search_plan(planning(), other, DROP, search=options)
    assert "are not used: evaluate gave the original model" in caplog.text
    assert not any(item.cached for item in found.trials)
    again = search_plan(planning(), other, DROP, search=options)
    assert all(item.cached for item in again.trials)  # written over


def test_a_damaged_evaluation_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = Search(cache=tmp_path)
    search_plan(planning(), metric(), DROP, search=options)
    for position, file in enumerate(sorted(tmp_path.iterdir())):
        file.write_text("{" if position % 2 else json.dumps({"scores": [1]}), encoding="utf-8")
    with caplog.at_level(logging.WARNING, "splitfold"):
        found = search_plan(planning(), metric(), DROP, search=options)
    assert not any(item.cached for item in found.trials)
    assert "is no evaluation and is made anew" in caplog.text


# Side by side


@contextmanager
def dask() -> Iterator[None]:
    distributed = pytest.importorskip("distributed", reason="dask[distributed] is not installed")
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, processes=True
    )
    with cluster, distributed.Client(cluster), joblib.parallel_config(backend="dask"):
        yield


BACKENDS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "threading": lambda: joblib.parallel_config(backend="threading", n_jobs=3),
    "loky": lambda: joblib.parallel_config(backend="loky", n_jobs=2),
    "dask": dask,
}


@functools.cache
def alone() -> dict[str, tuple[float, float]]:
    """Metric and drop of every plan of the coarse front, evaluated one by one."""
    return {item.digest: (item.judgement.metric, item.judgement.drop) for item in _searched().trials}


def _searched() -> Searched:
    return search_plan(planning(), metric(per_sample=True), DROP)


@pytest.mark.parametrize("backend", BACKENDS)
def test_workers_find_what_one_finds(backend: str) -> None:
    with BACKENDS[backend]():
        found = _searched()
    assert found.met
    common = [item for item in found.trials if item.digest in alone()]
    assert common
    for item in common:
        assert (item.judgement.metric, item.judgement.drop) == pytest.approx(alone()[item.digest], rel=1e-5)
    one = _searched()
    assert found.best.size == pytest.approx(one.best.size, rel=0.02)


def test_a_metric_that_cannot_be_sent_is_refused() -> None:
    lock = threading.Lock()

    def evaluate(session: Session) -> object:
        with lock:
            return metric()(session)

    with pytest.raises(EvaluationError, match=r"cannot be run in other processes.*jobs=1"):
        search_plan(planning(), evaluate, DROP, search=Search(jobs=2))  # type: ignore[arg-type]
    with joblib.parallel_config(backend="threading"):
        assert search_plan(planning(), evaluate, DROP, search=Search(jobs=2)).met  # type: ignore[arg-type]


def test_an_error_in_a_worker_is_told() -> None:
    failing = Agreement(metric().feeds, metric().reference[:3])
    calls = functools.partial(_first_ok, failing)
    with pytest.raises(EvaluationError, match="raised ValueError for a plan of"):
        search_plan(planning(), calls, DROP, search=Search(jobs=2))


def _first_ok(failing: Agreement, session: Session) -> object:
    good = metric(per_sample=True)(session)
    return good if float(np.mean(good)) > -1e-12 else failing(session)
