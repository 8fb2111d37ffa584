# SPDX-License-Identifier: Apache-2.0
"""Errors of passes and of their text form."""

from __future__ import annotations

from splitfold.runtime.errors import SplitfoldError

__all__ = ["PassFailedError", "SpecError"]


class SpecError(SplitfoldError):
    """A pipeline text, preset, option or layer pattern that splitfold does not understand.

    Common causes: a misspelt pass or option (the message suggests the nearest), a value of the wrong
        type, an `exclude`
    pattern that matches no layer.
    """


class PassFailedError(SplitfoldError):
    """A pass raised, left an invalid model, changed outputs it promised to keep, or applied nothing where
    that was required.

    Attributes:
        failed: text form of the pass.
        before: text forms of the passes that ran before it, in order.
    """

    def __init__(self, message: str, *, failed: str, before: tuple[str, ...] = ()) -> None:
        ran = f" (ran before it: {', '.join(before)})" if before else ""
        super().__init__(f"pass {failed} failed{ran}: {message}")
        self.failed = failed
        self.before = before
