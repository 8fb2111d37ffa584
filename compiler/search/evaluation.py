# SPDX-License-Identifier: Apache-2.0
"""Evaluating models, one after the other or side by side; the only file that imports joblib.

Which workers there are is the user's affair: `joblib.parallel_config` names the backend, which may be a
cluster. A model goes to a worker as the bytes of its file, so that no common disk is needed.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import joblib
import onnx
import onnx_ir as ir

from splitfold.compiler.errors import EvaluationError
from splitfold.compiler.search.scores import Evaluate, Scores, read_scores
from splitfold.runtime.errors import SessionError
from splitfold.runtime.model_file import self_contained, weight_bytes
from splitfold.runtime.session import Session
from splitfold.runtime.target import Target

__all__ = ["Outcome", "Subject", "evaluate_all", "workers"]

logger = logging.getLogger(__name__)

_SENT_BELOW = 1_500_000_000
"""Bytes of weights up to which a model fits one message."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to evaluate, and its name for people."""

    what: str
    model: ir.Model


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of an evaluation.

    Attributes:
        scores: what `evaluate` returned; None where the model does not run.
        fault: why it does not.
    """

    scores: Scores | None
    fault: str = ""


@dataclass(frozen=True)
class _Failed:
    """An error of `evaluate`, as far as every process can read it."""

    message: str
    trace: str


def workers(jobs: int | None) -> int:
    """Return how many models are evaluated at a time; see `Search.jobs`."""
    return int(joblib.effective_n_jobs(jobs))


def evaluate_all(
    evaluate: Evaluate, subjects: Sequence[Subject], target: Target, jobs: int | None = None
) -> list[Outcome]:
    """Return the outcome of each model, in order.

    Raises:
        EvaluationError: `evaluate` raised, returned no scores, or cannot be sent to another process.
    """
    large = any(weight_bytes(subject.model) >= _SENT_BELOW for subject in subjects)
    side_by_side = min(workers(jobs), len(subjects))
    if side_by_side < 2 or large:
        if large and side_by_side > 1:
            logger.warning("models of this size are not sent to other processes: one is evaluated at a time")
        return [_checked(_evaluated(evaluate, item.what, item.model, target, 0)) for item in subjects]
    return [_checked(found) for found in _sent(evaluate, subjects, target, jobs, side_by_side)]


def _sent(
    evaluate: Evaluate, subjects: Sequence[Subject], target: Target, jobs: int | None, count: int
) -> Sequence[Outcome | _Failed]:
    tasks = (
        joblib.delayed(_received)(
            evaluate, item.what, ir.to_proto(self_contained(item.model)).SerializeToString(), target, count
        )
        for item in subjects
    )
    try:
        found: Sequence[Outcome | _Failed] = joblib.Parallel(n_jobs=jobs)(tasks)
    except Exception as error:  # what evaluate itself raises comes back as a value
        raise EvaluationError(
            f"evaluate cannot be run in other processes: {type(error).__name__}: {error}. It is pickled: "
            "give a function of a module that opens its data when it is called, evaluate one model at a time "
            '(jobs=1), or in threads (joblib.parallel_config(backend="threading")).'
        ) from error
    return found


def _received(evaluate: Evaluate, what: str, model: bytes, target: Target, count: int) -> Outcome | _Failed:
    """Evaluate a model in a worker: the cores of its machine are shared with the others."""
    threads = max(1, int(joblib.cpu_count()) // count)
    return _evaluated(evaluate, what, ir.from_proto(onnx.load_model_from_string(model)), target, threads)


def _evaluated(
    evaluate: Evaluate, what: str, model: ir.Model, target: Target, threads: int
) -> Outcome | _Failed:
    try:
        return Outcome(read_scores(evaluate(Session(model, target, threads=threads)), what))
    except SessionError as error:
        return Outcome(None, f"it does not run: {error}")
    except EvaluationError as error:
        return _Failed(str(error), "")
    except Exception as error:
        return _Failed(f"evaluate raised {type(error).__name__} for {what}: {error}", traceback.format_exc())


def _checked(found: Outcome | _Failed) -> Outcome:
    if isinstance(found, Outcome):
        return found
    error = EvaluationError(found.message)
    if found.trace:
        error.add_note(found.trace)
    raise error
