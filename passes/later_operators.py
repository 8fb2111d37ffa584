# SPDX-License-Identifier: Apache-2.0
"""Operators that ONNX has only from some opset on: whether a model for a target can use one."""

from __future__ import annotations

import onnx_ir as ir

from splitfold.passes.opset import default_opset, raise_opset
from splitfold.passes.values import forget_names
from splitfold.runtime.target import Target

__all__ = ["make_available"]


def make_available(model: ir.Model, operator: str, opset: int, target: Target) -> str:
    """Raise `model` to `opset`, from which on ONNX has `operator`; return why that cannot be, or nothing.

    A raised model has another graph: nodes and values found before are no longer its own.
    """
    if operator in target.left_out:
        return f"target {target.name} has no kernel for {operator}"
    if default_opset(model) >= opset:
        return ""
    if target.opset < opset:
        return f"{operator} needs opset {opset}: target {target.name} runs opset {target.opset}"
    reason = raise_opset(model, opset)
    forget_names(model)
    return f"{operator} needs opset {opset}: {reason}" if reason else ""
