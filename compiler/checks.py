# SPDX-License-Identifier: Apache-2.0
"""The ONNX checker, and observers that find the pass after which a model is refused."""

from __future__ import annotations

import abc
import logging

import onnx
import onnx_ir as ir

from splitfold.compiler.errors import VerificationError
from splitfold.passes.base import Context, Pass
from splitfold.passes.errors import Failure, PassFailedError
from splitfold.passes.legalize import LegalizePass
from splitfold.passes.pipeline import PassRecord
from splitfold.runtime.errors import SessionError
from splitfold.runtime.feeds import Feeds
from splitfold.runtime.model_file import self_contained, weight_bytes
from splitfold.runtime.session import Session
from splitfold.runtime.target import Target

__all__ = ["FirstInvalid", "FirstNotDeployed", "checker_fault"]

logger = logging.getLogger(__name__)

_CHECKED_BELOW = 1_000_000_000
"""Bytes of weights above which the ONNX checker is not asked: protobuf ends at 2 GB."""


def checker_fault(model: ir.Model) -> str | None:
    """Return why the ONNX checker refuses `model`, and in which node where it says so, or None."""
    if weight_bytes(model) > _CHECKED_BELOW:
        return None  # the session that opens next checks the same
    try:
        onnx.checker.check_model(ir.to_proto(self_contained(model)))
    except onnx.checker.ValidationError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return " ".join(lines[:1] + [line for line in lines[1:] if line.startswith("==>")])
    return None


class _Search(abc.ABC):
    """Observer of a pipeline that is known to fail: it raises after the first pass that is to blame."""

    def __init__(self) -> None:
        self._done: tuple[str, ...] = ()

    def before_pass(self, step: Pass, model: ir.Model, index: int, total: int) -> None:
        """Forget an earlier run."""
        if index == 0:
            self._done = ()

    def after_pass(self, step: Pass, model: ir.Model, record: PassRecord) -> PassRecord:
        """Raise where the model is refused now."""
        if record.modified:
            self.check(step, model)
        self._done = (*self._done, record.text)
        return record

    @abc.abstractmethod
    def check(self, step: Pass, model: ir.Model) -> None:
        """Raise where `model`, as it is after `step`, is refused."""


class FirstInvalid(_Search):
    """Raises `PassFailedError` after the first pass whose model the ONNX checker refuses."""

    def check(self, step: Pass, model: ir.Model) -> None:
        """Ask the checker."""
        if (fault := checker_fault(model)) is not None:
            raise PassFailedError(
                f"the model is not valid ONNX any more: {fault}",
                failed=str(step),
                before=self._done,
                kind=Failure.INVALID,
            )


class FirstNotDeployed(_Search):
    """Raises `VerificationError` after the first pass whose model, legalized, does not run with the runtime's
    optimisations on."""

    def __init__(self, feeds: Feeds, target: Target) -> None:
        super().__init__()
        self._feeds, self._target = feeds, target

    def check(self, step: Pass, model: ir.Model) -> None:
        """Open the model as deployed, and run it."""
        legal = model.clone()
        LegalizePass().run(legal, Context(self._target))
        try:
            Session(legal, self._target).run(self._feeds)
        except SessionError as error:
            raise VerificationError(
                f"the result does not run as deployed: {str(error).rstrip('.')}. "
                f"The first pass after which it does not is {step}.",
                kind=Failure.NOT_DEPLOYED,
                blame=str(step),
            ) from error
