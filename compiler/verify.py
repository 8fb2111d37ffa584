# SPDX-License-Identifier: Apache-2.0
"""Verification: exact passes are held to it, lossy ones are measured, and the end result is compared with the
reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from splitfold.compiler.errors import VerificationError
from splitfold.passes.base import Contract, Pass
from splitfold.passes.errors import Failure, PassFailedError
from splitfold.passes.pipeline import PassRecord
from splitfold.runtime.compare import Deviation, deviation, exactness, first_non_finite, worst
from splitfold.runtime.errors import SessionError
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.session import Optimization, Session
from splitfold.runtime.target import Target

__all__ = ["Verifier", "compare_outputs", "rtol"]

_RTOL = {"f2": 5e-3, "f4": 1e-4, "f8": 1e-10}
"""Beyond re-association, by float dtype: relative to the value and the output's root mean square."""

Outputs = Mapping[str, Array]


class Verifier:
    """Observer that runs the model after every pass, the runtime's optimisations off, and compares its
    outputs with those before.

    Args:
        model: the model before the first pass.
        feeds: inputs it is run on.
        target: where it runs.
    """

    def __init__(self, model: ir.Model, feeds: Feeds, target: Target) -> None:
        self._feeds = feeds
        self._target = target
        self.reference: Outputs = self._run(model)
        """Outputs of the model before the first pass."""
        self._last = self.reference
        self._done: list[str] = []

    @classmethod
    def resumed(cls, reference: Outputs, feeds: Feeds, target: Target) -> Verifier:
        """Return a verifier for another run over the same model, whose outputs are already known."""
        made = cls.__new__(cls)
        made._feeds, made._target = feeds, target
        made.reference = made._last = reference
        made._done = []
        return made

    def _run(self, model: ir.Model) -> Outputs:
        return Session(model, self._target, optimization=Optimization.OFF).run(self._feeds)

    def before_pass(self, step: Pass, model: ir.Model, index: int, total: int) -> None:
        """Nothing to do."""

    def after_pass(self, step: Pass, model: ir.Model, record: PassRecord) -> PassRecord:
        """Run the model, hold an exact pass to its word, and add the deviation to the record.

        Raises:
            PassFailedError: the model does not run any more, an output has another shape or type, or an exact
                pass changed one.
            VerificationError: an output became NaN or infinite.
        """
        if not record.modified:
            self._done.append(record.text)
            return record
        now = self._outputs(step, model)
        self._check_signature(step, now)
        if step.contract is Contract.EXACT:
            self._check_exact(step, now)
        self._check_finite(step, now)
        found = worst(compare_outputs(self._last, now))
        self._last = now
        self._done.append(record.text)
        return dataclasses.replace(record, deviation=found[1] if found else None)

    def _outputs(self, step: Pass, model: ir.Model) -> Outputs:
        try:
            return self._run(model)
        except SessionError as error:
            raise PassFailedError(
                f"the model does not run any more: {error}",
                failed=str(step),
                before=tuple(self._done),
                kind=Failure.STOPPED,
            ) from error

    def _check_signature(self, step: Pass, now: Outputs) -> None:
        if step.contract is Contract.SEMANTIC:
            return
        if len(now) != len(self._last):
            raise self._moved(step, f"the model has {len(now)} outputs, it had {len(self._last)}")
        for (name, before), after in zip(self._last.items(), now.values(), strict=True):
            if (before.shape, before.dtype) != (after.shape, after.dtype):
                raise self._moved(
                    step, f"output '{name}' is {_form(after)}, it was {_form(before)}: its form changed"
                )

    def _check_exact(self, step: Pass, now: Outputs) -> None:
        for (name, before), after in zip(self._last.items(), now.values(), strict=True):
            found = exactness(before, after, rtol=rtol(before))
            if found.excess > 1:
                raise self._moved(
                    step,
                    f"it promises the same outputs, but '{name}' moved by up to {found.max_abs:.3g}, "
                    f"{found.excess:.3g} times what re-association explains",
                )

    def _moved(self, step: Pass, message: str) -> PassFailedError:
        return PassFailedError(message, failed=str(step), before=tuple(self._done), kind=Failure.MOVED)

    def _check_finite(self, step: Pass, now: Outputs) -> None:
        name = first_non_finite(now)
        if name is not None and first_non_finite(self._last) is None:
            raise VerificationError(
                f"after {step} output '{name}' holds NaN or infinity.",
                kind=Failure.NON_FINITE,
                output=name,
                blame=str(step),
            )


def _form(array: Array) -> str:
    return f"{array.dtype} {list(array.shape)}"


def rtol(reference: Array) -> float:
    """Return how far an array may be from `reference` by re-association, as `exactness` takes it."""
    return _RTOL.get(reference.dtype.str[1:], 1e-4)


def compare_outputs(reference: Outputs, actual: Outputs) -> dict[str, Deviation]:
    """Return the deviation of each numeric output, matched by position; a changed shape is infinitely far."""
    found = {}
    for (name, before), after in zip(reference.items(), actual.values(), strict=True):
        if before.dtype.kind not in "fiub":
            continue
        if before.shape != after.shape:
            found[name] = Deviation(np.inf, np.inf, 0.0, -np.inf, None)
        else:
            found[name] = deviation([before], [after])
    return found
