# SPDX-License-Identifier: Apache-2.0
"""Errors of capture, verification and budgets."""

from __future__ import annotations

from splitfold.passes.errors import BudgetError, Failure, FailureError
from splitfold.runtime.compare import Deviation
from splitfold.runtime.errors import SessionError, SplitfoldError

__all__ = [
    "BisectionError",
    "BudgetError",
    "CaptureError",
    "ComparisonError",
    "EvaluationError",
    "OriginalFailedError",
    "ReportError",
    "SubstitutionError",
    "VerificationError",
]


class CaptureError(SplitfoldError):
    """A model could not be turned into an ONNX graph.

    Common causes: a module with control flow that depends on data (the message names the module), example
        inputs that do not fit its `forward`, a
    missing `splitfold[torch]`.
    """


class SubstitutionError(SplitfoldError):
    """Attention of a torch module could not be replaced.

    Common causes: a model whose sizes change from call to call with a pass that needs to know them, attention
        that was not found (the message says which, and why), a step that is no substitution.
    """


class VerificationError(FailureError):
    """The compiled model is further from the reference than the tolerance allows, gives NaN or infinity, or
    does not run as deployed.

    Attributes:
        output: the output that is off.
        deviation: how far, where it is a matter of distance.
        blame: text form of the pass after which it first was, or an empty text.
    """

    def __init__(
        self,
        message: str,
        *,
        kind: Failure = Failure.TOLERANCE,
        output: str = "",
        deviation: Deviation | None = None,
        blame: str = "",
        layer: str = "",
    ) -> None:
        super().__init__(message, kind=kind, layer=layer)
        self.output = output
        self.deviation = deviation
        self.blame = blame

    @property
    def culprit(self) -> str:
        """Text form of the pass to blame; empty where none is known."""
        return self.blame


class EvaluationError(VerificationError):
    """The user's metric cannot be used: it raised, returned NaN, an infinity or something that is no score,
    or scored another number of samples than before.

    Common causes: a metric that draws its samples anew in each call, one that returns a tuple or a dict, one
    that holds what cannot be sent to another process.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, kind=Failure.METRIC)


class OriginalFailedError(FailureError, SessionError):
    """The model that is to be compiled does not run on the inputs that it is to be verified on.

    Common causes: an input that its layers do not allow, such as an index beyond a table; a fault of the
    runtime, whose message is quoted.
    """


class BisectionError(SplitfoldError):
    """A bisection cannot be made: the metric is unusable, the original does not meet it, or the whole
    pipeline does."""


class ComparisonError(SplitfoldError):
    """Two models cannot be compared layer by layer.

    Common causes: inputs or outputs of other names or types (the message names the first), two models of
    which neither was made from the other.
    """


class ReportError(SplitfoldError):
    """A report cannot be made: a package that it needs is not installed; the message says which."""
