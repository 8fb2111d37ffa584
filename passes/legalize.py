# SPDX-License-Identifier: Apache-2.0
"""Make a model runnable on its target: rewrite what can be, refuse the rest by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from splitfold.passes.affine import BlockQuantized, dequantize_blocks, unpack_codes
from splitfold.passes.base import Context, Contract, Findings, Pass
from splitfold.passes.identity import display_layer
from splitfold.passes.opset import default_opset
from splitfold.passes.tie_weights import tie_transposed
from splitfold.passes.values import add_initializer, constant, drop_unused, emit, int_attribute, replace_value
from splitfold.runtime.errors import UnsupportedError
from splitfold.runtime.target import Carrier

__all__ = ["LegalizePass"]


@dataclass(frozen=True)
class LegalizePass(Pass):
    """Rewrite what the target cannot run; refuse what cannot be rewritten.

    MatMulNBits on a target without that kernel becomes a float MatMul of the dequantized weight (the numbers
    stay, the size does not). A redundant `output_dtype` of QuantizeLinear is dropped: with int8 activations
    the runtime refuses to load it. Operators of an unknown domain are kept and named.

    A large matrix that is the transpose of another one (a tied output layer, unfolded so that passes could
    quantize it) is stored once again.

    Before::

        y = com.microsoft::MatMulNBits(x, W_int4, W_scales)      # on a target without it

    After::

        y = MatMul(x, W)
    """

    name: ClassVar[str] = "legalize"
    contract: ClassVar[Contract] = Contract.EXACT
    takes: ClassVar[str] = "what the target cannot run, and a weight that is the transpose of another one"

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class.

        Raises:
            UnsupportedError: the model's opset is newer than the target's.
        """
        target = context.target
        if default_opset(model) > target.opset:
            raise UnsupportedError(
                f"the model has opset {default_opset(model)}, target {target.name} runs up to "
                f"{target.opset}: export it with opset {target.opset}."
            )
        changed = False
        if tied := tie_transposed(model, findings):
            findings.apply("model", f"weights stored once with their transpose: {tied}")
            changed = True
        for graph in model.graphs():
            for node in list(graph):
                if not target.supports(node):
                    findings.skip(
                        display_layer(node),
                        f"custom operator {node.domain}::{node.op_type} is kept: register its library",
                    )
                elif node.op_type == "MatMulNBits" and not target.carries(Carrier.MATMUL_NBITS):
                    changed |= _expand(node, findings)
                elif node.op_type == "QuantizeLinear":
                    changed |= _drop_output_dtype(node, findings)
        return changed


def _drop_output_dtype(node: ir.Node, findings: Findings) -> bool:
    if "output_dtype" not in node.attributes or len(node.inputs) < 3 or node.inputs[2] is None:
        return False
    node.attributes.pop("output_dtype")
    findings.apply(display_layer(node), "redundant output_dtype dropped")
    return True


def _expand(node: ir.Node, findings: Findings) -> bool:
    layer = display_layer(node)
    packed, scales = constant(node.inputs[1]), constant(node.inputs[2])
    zeros = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    if packed is None or scales is None or len(node.inputs) > 4 or node.graph is None:
        raise UnsupportedError(
            f"{layer}: this MatMulNBits has computed weights or a group index; it cannot be rewritten."
        )
    weight = _weight(node, packed.numpy(), scales.numpy(), None if zeros is None else zeros.numpy())
    held = add_initializer(node.graph, f"{node.outputs[0].name}_weight", weight)
    result = emit(
        node, "MatMul", [node.inputs[0], held], names=[f"{node.outputs[0].name}_float"], like=node.outputs[0]
    )
    replace_value(node.outputs[0], result)
    drop_unused([node])
    findings.apply(layer, "MatMulNBits expanded to a float MatMul")
    return True


def _weight(node: ir.Node, packed: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None) -> np.ndarray:
    bits, block = int_attribute(node, "bits", 4), int_attribute(node, "block_size", 32)
    rows, columns = int_attribute(node, "N", 0), int_attribute(node, "K", 0)
    blocks = -(-columns // block)
    codes = unpack_codes(packed.reshape(rows, blocks, -1), bits, block)
    points = None if zeros is None else unpack_codes(zeros.reshape(rows, -1), bits, blocks)
    quantized = BlockQuantized(codes, scales.reshape(rows, blocks), points, bits, columns)
    return np.ascontiguousarray(dequantize_blocks(quantized).T)
