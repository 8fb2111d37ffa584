# SPDX-License-Identifier: Apache-2.0
"""Which input marks padding, where the user may name one."""

from __future__ import annotations

import onnx_ir as ir

from splitfold.compiler.errors import ComparisonError
from splitfold.runtime.errors import did_you_mean
from splitfold.runtime.feeds import model_inputs
from splitfold.runtime.padding import PADDING, Padding, marks_padding

__all__ = ["PADDING", "Padding", "find_padding"]


def find_padding(model: ir.Model, name: str | None) -> Padding:
    """Return the padding that the input `name` marks; where that is the usual name, the model need not have
    it.

    Raises:
        ComparisonError: there is no such input, or it is not of shape [batch, positions].
    """
    inputs = {value.name or "": value for value in model_inputs(model)}
    if name is None or (name == PADDING and not marks_padding(inputs.get(name))):
        return Padding()
    if name not in inputs:
        near = did_you_mean(name, inputs)
        raise ComparisonError(f"no input '{name}' marks padding.{near} Inputs: {', '.join(inputs)}.")
    if not marks_padding(inputs[name]):
        raise ComparisonError(
            f"input '{name}' cannot mark padding: that takes whole numbers of shape [batch, positions]."
        )
    return Padding(name)
