# SPDX-License-Identifier: Apache-2.0
"""Errors of passes and of their text form."""

from __future__ import annotations

import enum

from splitfold.runtime.errors import SplitfoldError

__all__ = ["BudgetError", "Failure", "FailureError", "PassFailedError", "SpecError"]


class SpecError(SplitfoldError):
    """A pipeline text, preset, option or layer pattern that splitfold does not understand.

    Common causes: a misspelt pass or option (the message suggests the nearest), a value of the wrong
        type, an `exclude`
    pattern that matches no layer.
    """


class BudgetError(SplitfoldError):
    """The result misses the budget; the message says what was reached.

    Attributes:
        reached: the nearest to the budget that was reached, in its own unit; empty where only the message
            says it.
        binds: the limit that was not kept; empty likewise.
    """

    def __init__(self, message: str, *, reached: str = "", binds: str = "") -> None:
        super().__init__(message)
        self.reached = reached
        self.binds = binds


class Failure(enum.Enum):
    """In which way the work failed."""

    RAISED = "raised"
    """A pass raised something unexpected, or the runtime failed inside it."""
    MOVED = "moved"
    """An exact pass moved an output."""
    UNTRUE = "untrue"
    """A pass said that it changed nothing and did, or the other way round."""
    STOPPED = "stopped"
    """The model does not run any more after a pass."""
    INVALID = "invalid"
    """The ONNX checker refuses the model after a pass."""
    NON_FINITE = "non-finite"
    """An output became NaN or infinite."""
    NOT_DEPLOYED = "not-deployed"
    """The model runs as written, but not with the runtime's optimisations on."""
    TOLERANCE = "tolerance"
    """The outputs are further from the reference than allowed."""
    UNREALISED = "unrealised"
    """No low-bit kernel computes a low-bit layer, and that was to be an error."""
    NOT_APPLIED = "not-applied"
    """A pass applied less than was required."""
    ORIGINAL = "original"
    """The model that was given does not run."""
    METRIC = "metric"
    """The user's metric fell too far, or is NaN."""


class FailureError(SplitfoldError):
    """The work failed: not for want of good input, but in a pass, in the runtime, or in verification.

    Attributes:
        kind: in which way.
        layer: user-facing name of the layer where it failed, or an empty text where none can be named.
        found: a sentence on how the layer was found; empty where the message says enough.
        reproducer: a line that names the folder of a small reproducer, or says why there is none.
    """

    def __init__(self, message: str, *, kind: Failure, layer: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.layer = layer
        self.found = ""
        self.reproducer = ""

    @property
    def message(self) -> str:
        """What happened, without layer and reproducer."""
        return str(self.args[0])

    @property
    def culprit(self) -> str:
        """Text form of the pass that failed or is to blame; empty where none is known."""
        return ""

    def __str__(self) -> str:
        text = self._headline()
        if self.found:
            text = f"{text.rstrip('.')}. {self.found}"
        if self.layer and self.layer not in text:
            text = f"{text.rstrip('.')}. Layer: {self.layer}."
        return f"{text}\n{self.reproducer}" if self.reproducer else text

    def _headline(self) -> str:
        return self.message


class PassFailedError(FailureError):
    """A pass raised, left an invalid model, changed outputs it promised to keep, was untruthful, or applied
    nothing where that was required.

    Attributes:
        failed: text form of the pass.
        before: text forms of the passes that ran before it, in order.
    """

    def __init__(
        self,
        message: str,
        *,
        failed: str,
        before: tuple[str, ...] = (),
        kind: Failure = Failure.RAISED,
        layer: str = "",
    ) -> None:
        super().__init__(message, kind=kind, layer=layer)
        self.failed = failed
        self.before = before

    @property
    def culprit(self) -> str:
        """Text form of the pass."""
        return self.failed

    def _headline(self) -> str:
        ran = f" (ran before it: {', '.join(self.before)})" if self.before else ""
        where = f" at layer {self.layer}" if self.layer else ""
        return f"pass {self.failed} failed{ran}{where}: {self.message}"
