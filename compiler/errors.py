# SPDX-License-Identifier: Apache-2.0
"""Errors of capture, verification and budgets."""

from __future__ import annotations

from splitfold.runtime.compare import Deviation
from splitfold.runtime.errors import SplitfoldError

__all__ = ["BudgetError", "CaptureError", "VerificationError"]


class CaptureError(SplitfoldError):
    """A model could not be turned into an ONNX graph.

    Common causes: a module with control flow that depends on data (the message names the module), example
        inputs that do not fit its `forward`, a
    missing `splitfold[torch]`.
    """


class VerificationError(SplitfoldError):
    """The compiled model is further from the reference than the tolerance allows, or gives NaN or infinity.

    Attributes:
        output: the output that is off.
        deviation: how far, where it is a matter of distance.
        blame: text form of the pass after which it first was, or an empty text.
    """

    def __init__(
        self, message: str, *, output: str = "", deviation: Deviation | None = None, blame: str = ""
    ) -> None:
        super().__init__(message)
        self.output = output
        self.deviation = deviation
        self.blame = blame


class BudgetError(SplitfoldError):
    """The result misses the budget; the message says what was reached."""
