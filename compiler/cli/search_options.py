# SPDX-License-Identifier: Apache-2.0
"""Options of the search for the best model within a drop of a metric, shared by ``compile`` and ``plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import onnx_ir as ir
import typer

from splitfold.compiler.cli.output import say
from splitfold.compiler.search.found import Searched, Trial
from splitfold.compiler.search.options import Goal, Search, Unmet
from splitfold.passes.base import Pass
from splitfold.passes.errors import SpecError
from splitfold.passes.pipeline import PassRecord
from splitfold.runtime.errors import did_you_mean

__all__ = [
    "CONFIDENCE",
    "GOAL",
    "LIMIT",
    "CacheOption",
    "ConfidenceOption",
    "EvaluateOption",
    "GoalOption",
    "JobsOption",
    "LimitOption",
    "MaxDropOption",
    "SecondsOption",
    "StrictOption",
    "TellTrials",
    "check_search",
    "parse_search",
    "say_search",
]

_DEFAULT = Search()

EvaluateOption = Annotated[
    str | None,
    typer.Option(
        "--evaluate",
        metavar="package.module:function",
        help="A metric of an opened session, more is better: one number, or an array of scores of samples.",
    ),
]
MaxDropOption = Annotated[
    float | None,
    typer.Option(
        "--max-drop",
        metavar="NUMBER",
        min=0,
        help="What the metric of --evaluate may lose: the smallest model that keeps it is searched.",
    ),
]
GoalOption = Annotated[
    str, typer.Option("--goal", metavar="GOAL", help="What --max-drop searches: smallest or fastest.")
]
LimitOption = Annotated[
    int,
    typer.Option("--limit", metavar="N", min=2, help="Models to evaluate at most, the original included."),
]
SecondsOption = Annotated[
    float | None,
    typer.Option("--seconds", metavar="S", help="Begin no further evaluation after this time."),
]
ConfidenceOption = Annotated[
    float,
    typer.Option(
        "--confidence",
        metavar="SHARE",
        help="Of each end of a drop's interval; there is one where --evaluate returns a score a sample.",
    ),
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        "--cache", metavar="DIR", help="Keep evaluations here, for later searches with this metric and data."
    ),
]
JobsOption = Annotated[
    int | None, typer.Option("--jobs", metavar="N", help="Models to evaluate at a time (-1: one a core).")
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="An error where no model keeps the metric, instead of the best one.")
]

LIMIT, CONFIDENCE, GOAL = _DEFAULT.evaluations, _DEFAULT.confidence, _DEFAULT.goal.value
"""Defaults of the options."""


def check_search(evaluate: str | None, max_drop: float | None, *, both: bool) -> None:
    """Raise `typer.BadParameter` where ``--max-drop`` lacks a metric, or a metric ``--max-drop`` and `both`
    must be given."""
    if (evaluate is None and max_drop is not None) or (both and (evaluate is None) != (max_drop is None)):
        raise typer.BadParameter("give both of them.", param_hint="--evaluate / --max-drop")


def parse_search(
    goal: str,
    limit: int,
    seconds: float | None,
    confidence: float,
    cache: Path | None,
    jobs: int | None,
    strict: bool,
) -> Search:
    """Return the options of the search.

    Raises:
        typer.BadParameter: a value is wrong.
    """
    words = [item.value for item in Goal]
    try:
        if goal not in words:
            raise SpecError(f"unknown goal '{goal}'.{did_you_mean(goal, words)} Known: {', '.join(words)}.")
        return Search(
            goal=Goal(goal),
            evaluations=limit,
            seconds=seconds,
            confidence=confidence,
            jobs=jobs,
            cache=cache,
            unmet=Unmet.RAISE if strict else Unmet.RETURN,
        )
    except (SpecError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error


class TellTrials:
    """Observer that prints a line for each model of a search."""

    def before_pass(self, step: Pass, model: ir.Model, index: int, total: int) -> None:
        """Nothing to do."""

    def after_pass(self, step: Pass, model: ir.Model, record: PassRecord) -> PassRecord:
        """Nothing to do."""
        return record

    def after_trial(self, trial: Trial, evaluations: int, limit: int) -> None:
        """Print how it does."""
        known = " (known)" if trial.cached else ""
        say("evaluation", f"{evaluations} of at most {limit}{known}: {trial.cost_text}: {trial.judgement}")


def say_search(found: Searched) -> None:
    """Print what a search came to."""
    say("original", f"metric {found.original:.6g}")
    say("search", found.statement)
