# SPDX-License-Identifier: Apache-2.0
"""Which channels of a layer a branch holds, where a Gather picks them from its input or orders its output."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from splitfold.passes.values import constant, int_attribute, sole_consumer
from splitfold.runtime.feeds import Array

__all__ = ["order_of_outputs", "picked_inputs"]

_REACH = 4
"""Operators between a product and the Gather that picks its input: scaling, quantization."""


def picked_inputs(product: ir.Node) -> Array | None:
    """Return the numbers of the input channels that `product` reads, None where it reads all."""
    value = product.inputs[0]
    for _ in range(_REACH):
        maker = value.producer() if value is not None else None
        if maker is None or not maker.inputs:
            return None
        if (found := _channels(maker)) is not None:
            return found
        value = maker.inputs[0]
    return None


def order_of_outputs(branch: ir.Value) -> Array | None:
    """Return the order in which a Gather puts the concatenated outputs of branches, or None where it is
    theirs."""
    joined = sole_consumer(branch)
    if joined is None or joined.op_type != "Concat":
        return None
    reader = sole_consumer(joined.outputs[0])
    return _channels(reader) if reader is not None else None


def _channels(node: ir.Node) -> Array | None:
    """Return the indices of a Gather of computed channels, the last axis."""
    if node.op_type != "Gather" or constant(node.inputs[0]) is not None:
        return None
    value = node.inputs[0]
    last = {-1} if value is None or value.shape is None else {-1, len(value.shape) - 1}
    indices = constant(node.inputs[1])
    if indices is None or len(indices.shape) != 1 or int_attribute(node, "axis", 0) not in last:
        return None
    return np.asarray(indices.numpy())
