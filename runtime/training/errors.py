# SPDX-License-Identifier: Apache-2.0
"""Errors of training."""

from __future__ import annotations

from splitfold.runtime.errors import SplitfoldError

__all__ = ["TrainingError"]


class TrainingError(SplitfoldError):
    """Training cannot start or go on.

    Common causes: a loss that is NaN or infinite (a smaller rate helps), a loss that does not depend on what
        is trained, data that can be walked only once, a checkpoint of another model or other settings.
    """
