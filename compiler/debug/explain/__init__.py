# SPDX-License-Identifier: Apache-2.0
"""What became of each layer, and why."""

from __future__ import annotations

from splitfold.compiler.debug.explain.explanation import Explanation, LayerExplanation, explain

__all__ = ["Explanation", "LayerExplanation", "explain"]
