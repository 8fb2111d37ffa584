# SPDX-License-Identifier: Apache-2.0
"""How far a compiled model is from its reference at each layer, and where the error arises."""

from __future__ import annotations

from splitfold.compiler.debug.drift.measurement import Drift, Point, drift

__all__ = ["Drift", "Point", "drift"]
