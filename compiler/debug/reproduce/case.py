# SPDX-License-Identifier: Apache-2.0
"""A case: what `compile` is given, small enough to keep; running it tells how it fails."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import onnx_ir as ir

from splitfold.compiler.build import Job, build, complete
from splitfold.compiler.checkpoint import Checkpoint
from splitfold.compiler.realisation import Unrealised
from splitfold.compiler.source import load_source
from splitfold.compiler.tolerance import Tolerance
from splitfold.passes.errors import FailureError
from splitfold.passes.pipeline import Pipeline
from splitfold.runtime.feeds import Feeds
from splitfold.runtime.target import Target

__all__ = ["Case", "Signature", "attempt"]

_TEXT = 160
"""Characters of a message that tell its kind."""


@dataclass(frozen=True)
class Case:
    """A compilation.

    Attributes:
        model: ONNX graph; it is not changed.
        feeds: example inputs, or None for synthetic ones.
        batches: calibration data; empty for none.
        steps: passes, without the canonicalization and legalization that `compile` adds.
        target, tolerance, unrealised: as `compile` takes them.
    """

    model: ir.Model
    feeds: Feeds | None
    batches: tuple[Feeds, ...]
    steps: Pipeline
    target: Target
    tolerance: Tolerance
    unrealised: Unrealised


@dataclass(frozen=True)
class Signature:
    """What two failures have in common that are the same one, in models of other size.

    Attributes:
        error: type of the error, and of its cause.
        kind: in which way the work failed; empty for errors of another sort.
        culprit: name of the pass that failed or is to blame.
        text: the message without names, numbers and shapes.
    """

    error: str
    kind: str
    culprit: str
    text: str

    @staticmethod
    def of(error: BaseException) -> Signature:
        """Return the signature of an error of `compile`."""
        if not isinstance(error, FailureError):
            return Signature(type(error).__name__, "", "", _kind_of_text(str(error)))
        culprit = error.culprit.partition("{")[0]
        return Signature(type(error).__name__, error.kind.value, culprit, _kind_of_text(error.message))


_VARIABLE = re.compile(r"'[^']*'|\"[^\"]*\"|\{[^{}]*\}|\[[^\[\]]*\]|\([^()]*\)|\S*[\d/_]\S*|\b(?:inf|nan)\b")
"""Parts of a message that differ from model to model: what is quoted or bracketed, numbers, names, paths."""


def _kind_of_text(message: str) -> str:
    text, last = message, ""
    while text != last:  # brackets within brackets
        text, last = _VARIABLE.sub(" ", text), text
    return " ".join(text.split())[:_TEXT]


def attempt(case: Case) -> Exception | None:
    """Compile `case` as `compile` would, and return the error; None where it works.

    Nothing is logged, no layer is named, and no reproducer written.
    """
    with _silence():
        try:
            source = load_source(case.model, case.feeds, None, list(case.batches) or None, case.target)
            job = Job(source, complete(case.steps), case.target, case.tolerance, case.unrealised)
            build(job, Checkpoint())
        except Exception as error:
            return error
    return None


@contextmanager
def _silence() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("splitfold", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
