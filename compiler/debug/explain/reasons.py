# SPDX-License-Identifier: Apache-2.0
"""Why a node holds no low-bit weight: an answer for every node, from what stands in the graph."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from splitfold.passes.keep_float import FLOAT_CONV
from splitfold.passes.layers import unsupported_reason
from splitfold.passes.values import int_attribute

__all__ = ["Reason", "node_reason"]

_QUANTIZES = {"QuantizeLinear", "DynamicQuantizeLinear"}
_CONVERTS = {
    "QuantizeLinear": "it turns floats into 8-bit codes for the layers that read it",
    "DynamicQuantizeLinear": "it finds the range of each input at run time and turns it into 8-bit codes",
    "DequantizeLinear": "it turns codes back into floats; the runtime fuses it where it has a kernel",
}
_GUARDED = (
    "it stands between integer layers and is written so that the runtime leaves it in float: it was skipped "
    "or excluded, and the runtime would quantize it by itself"
)
_IN_REGION = (
    "it has no weights; what it reads and gives is 8-bit, and the runtime computes it in integers where it "
    "has such a kernel"
)
_PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_MICROSOFT = "com.microsoft"
_BODIES = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
_MOVES = {"Concat", "Flatten", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}


@dataclass(frozen=True)
class Reason:
    """Why a node holds no low-bit weight.

    Attributes:
        why: in words; empty for a candidate of the quantizing passes, for which their records say it.
        around: what it reads and gives; may be empty.
        telling: whether it says something on a layer as a whole, besides nodes that only move or convert.
    """

    why: str
    around: str = ""
    telling: bool = True


def node_reason(node: ir.Node) -> Reason:
    """Return why `node` holds no low-bit weight."""
    if node.op_type in _CONVERTS:
        return Reason(_CONVERTS[node.op_type], telling=False)
    if (node.domain, node.op_type) == (_MICROSOFT, FLOAT_CONV):
        return Reason(_GUARDED)
    reason = unsupported_reason(node)
    if reason is None:
        return Reason("")
    return Reason(reason) if reason else _without_weight(node)


def _without_weight(node: ir.Node) -> Reason:
    if any(attribute.type in _BODIES for attribute in node.attributes.values()):
        return Reason("it is control flow: the nodes of its bodies have rows of their own")
    if _integral(node):
        return Reason("it computes indices, shapes or flags, no floats", telling=False)
    if _in_region(node):
        return Reason(_IN_REGION)
    return Reason(_why_no_weight(node), _surroundings(node), telling=node.op_type not in _MOVES)


def _integral(node: ir.Node) -> bool:
    types = [value.dtype for value in node.outputs if value.dtype is not None]
    return bool(types) and all(
        kind.is_integer() or kind in (ir.DataType.BOOL, ir.DataType.STRING) for kind in types
    )


def _in_region(node: ir.Node) -> bool:
    """Whether all that the node reads was 8-bit and all that it gives becomes 8-bit, an activation that the
    grid implies aside."""
    if _absorbed(node):
        maker = node.inputs[0].producer() if node.inputs[0] is not None else None
        return maker is not None and _reads_codes(maker)
    readers = [use.node for value in node.outputs for use in value.uses()]
    quantized = all(reader.op_type == "QuantizeLinear" or _absorbed(reader) for reader in readers)
    return bool(readers) and quantized and _reads_codes(node)


def _reads_codes(node: ir.Node) -> bool:
    makers = [value.producer() for value in node.inputs if value is not None and not _constant(value)]
    return bool(makers) and all(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)


def _absorbed(node: ir.Node) -> bool:
    """Whether the node is an activation right before a grid."""
    readers = [use.node.op_type for value in node.outputs for use in value.uses()]
    return node.op_type in ("Clip", "Relu") and set(readers) == {"QuantizeLinear"}


def _why_no_weight(node: ir.Node) -> str:
    constants = [value for value in node.inputs if value is not None and _constant(value)]
    if node.op_type in _PRODUCTS:
        return "both operands are computed: there is no weight to hold in few bits"
    if node.op_type == "Gather" and constants:
        return _gather_reason(node)
    if node.op_type in _MOVES:
        return "it only moves values"
    tensors = [tensor for value in constants if (tensor := _tensor(value)) is not None]
    sizes = [tensor.size for tensor in tensors if tensor.dtype.is_floating_point()]
    if not sizes or max(sizes) == 1:
        return "it has no weights"
    return f"its {sum(sizes)} parameters are a bias, factors or the like, no matrix: no pass takes them up"


def _gather_reason(node: ir.Node) -> str:
    table = _tensor(node.inputs[0])
    if table is None:
        return "it selects from a computed value: there is no table to hold in few bits"
    if len(table.shape) != 2:
        return f"its table has rank {len(table.shape)}, not 2"
    if int_attribute(node, "axis", 0) != 0:
        return "it selects columns of its table, and the scales are those of rows"
    if table.shape[1] == 1:
        return "its table has a single column: a scale a row would be as large"
    return "its indices are constant"


def _surroundings(node: ir.Node) -> str:
    """Return what of its inputs and outputs is low-bit: activations are quantized on the way into layers with
    weights, and around convolutions."""
    makers = [value.producer() for value in node.inputs if value is not None]
    coded = any(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)
    readers = [use.node for value in node.outputs for use in value.uses()]
    quantized = any(reader.op_type in _QUANTIZES for reader in readers)
    before = "reads values that were 8-bit" if coded else "reads floats"
    after = (
        "what it gives is quantized on the way into the layers that read it" if quantized else "gives floats"
    )
    return f"it {before}{', ' if quantized else ' and '}{after}"


def _constant(value: ir.Value) -> bool:
    return _tensor(value) is not None


def _tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    return None if value is None else ir.convenience.get_const_tensor(value)
