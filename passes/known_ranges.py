# SPDX-License-Identifier: Apache-2.0
"""Ranges that follow from how a value is computed, so that no calibration data can miss a part of them."""

from __future__ import annotations

import onnx_ir as ir

from splitfold.passes.attention import find_attention

__all__ = ["known_ranges"]

_UNIT = (0.0, 1.0)
_CLIPS = {"Clip", "HardSigmoid", "Relu"}


def known_ranges(model: ir.Model) -> dict[str, tuple[float, float]]:
    """Return (low, high) by value name of clipped softmaxes as their products read them: [0, 1], of which a
    grid of 8 bits has the scale 1/255 (Bondarenko et al., 2023)."""
    operators = {node.op_type for node in model.graph.all_nodes()}
    if "Softmax" not in operators or not operators & _CLIPS:
        return {}
    return {
        block.probabilities.read.name or "": _UNIT
        for block in find_attention(model).blocks
        if block.probabilities is not None and block.probabilities.clipping is not None
    }
