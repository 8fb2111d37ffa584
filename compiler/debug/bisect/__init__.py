# SPDX-License-Identifier: Apache-2.0
"""Which pass and which layers break a metric."""

from __future__ import annotations

from splitfold.compiler.debug.bisect.bisection import Bisection, Culprit, bisect

__all__ = ["Bisection", "Culprit", "bisect"]
