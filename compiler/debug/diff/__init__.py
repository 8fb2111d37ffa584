# SPDX-License-Identifier: Apache-2.0
"""The difference of two models, by user layer."""

from __future__ import annotations

from splitfold.compiler.debug.diff.graph_diff import GraphDiff, diff

__all__ = ["GraphDiff", "diff"]
