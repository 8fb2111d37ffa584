# SPDX-License-Identifier: Apache-2.0
"""Activation functions applied to chunks of channels: which may be, along which axis, and how."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir

from splitfold.passes.branches import Branch, BranchKind, branches_of, mark_branch
from splitfold.passes.chunks import ChunkedValues, with_channels
from splitfold.passes.values import constant, drop_unused, emit, int_attribute, replace_value

__all__ = ["chunkable", "cut_function", "split_obstacle"]

_ELEMENTWISE = {
    "Celu", "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Relu", "Selu", "Sigmoid",
    "Softplus", "Softsign", "Tanh", "ThresholdedRelu",
}  # fmt: skip
"""Functions of one element each: any axis may be cut."""
_ALONG_AXIS = {"Softmax": -1, "LogSoftmax": -1, "Hardmax": -1}
"""Functions that mix one axis, and its default: any other may be cut."""
_MIXING = {
    "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LpNormalization",
    "MeanVarianceNormalization", "RMSNormalization", "SimplifiedLayerNormalization",
}  # fmt: skip
"""Norms: they mix channels, or have constants a channel."""
_CARRIES_ON = {"Add", "BatchNormalization", "Identity", "Mul", "Sub", "Sum", *_ELEMENTWISE}
"""Operators whose output has the channels of their input."""
_REACH = 6
"""Operators up to which a layer is looked for that tells which axis holds the channels."""


def chunkable(node: ir.Node) -> bool:
    """Return whether `node` is an activation function or a norm, by its operator."""
    return node.domain in ("", "ai.onnx") and node.op_type in {*_ELEMENTWISE, *_ALONG_AXIS, *_MIXING}


def split_obstacle(node: ir.Node) -> int | str:
    """Return the channel axis along which `node` may be cut, or the reason why it may not.

    The axis is 1 next to a convolution and the last one next to a linear layer: the axis 1 of the paper's
    code would be that of the tokens there.
    """
    if node.op_type in _MIXING:
        return f"{node.op_type} mixes channels, or scales each: a chunk cannot be computed alone"
    if any(mark.kind is BranchKind.SLICE for mark in branches_of(node.outputs[0])):
        return "it is a chunk already"
    axis = _channel_axis(node)
    if axis is None:
        return "no convolution or linear layer next to it tells which axis holds its channels"
    rank = None if node.outputs[0].shape is None else len(node.outputs[0].shape)
    if rank is None or rank < 2:
        return "the shape of its input is not known"
    along = int_attribute(node, "axis", _ALONG_AXIS.get(node.op_type, 0))
    if node.op_type in _ALONG_AXIS and along % rank == axis % rank:
        return f"{node.op_type} mixes the channel axis: a chunk cannot be computed alone"
    return axis


def _channel_axis(node: ir.Node) -> int | None:
    before, after = [node], [node]
    for _ in range(_REACH):
        before = [maker for here in before for maker in _makers(here)]
        after = [use.node for here in after for use in here.outputs[0].uses()]
        for found in (*before, *after):
            if found.op_type == "Conv":
                return 1
            if found.op_type in ("Gemm", "LayerNormalization") or _is_linear(found):
                return -1
        before, after = (
            [it for it in side if it.op_type in {*_CARRIES_ON, "Concat"}] for side in (before, after)
        )
    return None


def _makers(node: ir.Node) -> Iterable[ir.Node]:
    made = (value.producer() for value in node.inputs if value is not None)
    return [maker for maker in made if maker is not None]


def _is_linear(node: ir.Node) -> bool:
    return node.op_type == "MatMul" and constant(node.inputs[1]) is not None


def cut_function(node: ir.Node, axis: int, sizes: Sequence[int], chunked: ChunkedValues) -> None:
    """Put the function of each chunk, concatenated, in the place of `node`."""
    value, whole = node.inputs[0], node.outputs[0]
    if value is None:
        raise ValueError(f"{node.name}: input missing")
    results = []
    for number, chunk in enumerate(chunked.of(value, axis, sizes, node), start=1):
        result = emit(
            node,
            node.op_type,
            [chunk, *node.inputs[1:]],
            attributes=dict(node.attributes),
            names=[f"{whole.name}_chunk{number}"],
            like=whole,
        )
        result.shape = with_channels(whole, axis, sizes[number - 1])
        mark_branch(result, whole, Branch(BranchKind.SLICE, number, len(sizes)))
        results.append(result)
    maker = value.producer()
    joined = emit(
        node, "Concat", results, attributes={"axis": axis}, names=[f"{whole.name}_joined"], like=whole
    )
    replace_value(whole, joined)
    drop_unused([node] if maker is None else [node, maker])
