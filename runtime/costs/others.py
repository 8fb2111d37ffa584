# SPDX-License-Identifier: Apache-2.0
"""Models of softmax, norm, GELU, attention and conversions in each of their forms."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from splitfold.runtime.costs.builder import MICROSOFT, Builder, Built
from splitfold.runtime.costs.kernel import Form, Kernel, Operation, Shape

__all__ = ["attention_model", "conversion_model", "gelu_model", "norm_model", "softmax_model"]

_SCALE, _ZERO = np.array(np.float32(0.05)), np.array(np.uint8(128))
_EPSILON = 1e-5
_ATTENTION_OPSET = 23


def softmax_model(kernel: Kernel, shape: Shape) -> Built:
    """Return the model of a form of Softmax over the last axis of [rows, width]."""
    graph = Builder()
    if kernel.form is Form.FLOAT:
        return graph.built(graph.one("Softmax", graph.input(graph.normal(*shape)), axis=-1))
    x = graph.input(graph.rng.integers(0, 256, shape, np.uint8))
    scale, zero = graph.constant(_SCALE), graph.constant(_ZERO)
    to, none = graph.constant(np.array(np.float32(1 / 256))), graph.constant(np.array(np.uint8(0)))
    made = graph.one("QLinearSoftmax", x, scale, zero, to, none, domain=MICROSOFT, axis=-1, opset=21)
    return graph.built(made, ir.DataType.UINT8)


def norm_model(kernel: Kernel, shape: Shape) -> Built:
    """Return the model of a residual Add and LayerNormalization of [rows, width], apart (Sum, which the
    runtime does not fuse) or fused."""
    graph = Builder()
    x, skip = graph.input(graph.normal(1, *shape)), graph.input(graph.normal(1, *shape))
    gamma, beta = graph.constant(graph.normal(shape[1])), graph.constant(graph.normal(shape[1]))
    if kernel.form is Form.FLOAT:
        total = graph.one("Sum", x, skip)
        return graph.built(graph.one("LayerNormalization", total, gamma, beta, axis=-1, epsilon=_EPSILON))
    fused = graph.one("SkipLayerNormalization", x, skip, gamma, beta, domain=MICROSOFT, epsilon=_EPSILON)
    return graph.built(fused)


def gelu_model(kernel: Kernel, shape: Shape) -> Built:
    """Return the model of the exact GELU of [rows, width]: of the operators that it is made of, written so
    that the runtime does not fuse them, or the contrib operator."""
    graph = Builder()
    x = graph.input(graph.normal(*shape))
    if kernel.form is Form.FUSED:
        return graph.built(graph.one("Gelu", x, domain=MICROSOFT))
    root, one, half = (graph.constant(np.array(np.float32(item))) for item in (math.sqrt(0.5), 1.0, 0.5))
    share = graph.one("Sum", graph.one("Erf", graph.one("Mul", x, root)), one)
    return graph.built(graph.one("Mul", graph.one("Mul", x, share), half))


def attention_model(kernel: Kernel, shape: Shape) -> Built:
    """Return the model of attention from Q, K and V of [batch, tokens, heads * size] each.

    Args:
        shape: batch, heads, tokens, size.
    """
    batch, heads, tokens, size = shape
    graph = Builder(opset=_ATTENTION_OPSET if kernel.form is Form.STANDARD else 21)
    q, k, v = (graph.input(graph.normal(batch, tokens, heads * size)) for _ in range(3))
    if kernel.form is Form.STANDARD:
        return graph.built(graph.one("Attention", q, k, v, q_num_heads=heads, kv_num_heads=heads))
    if kernel.form in (Form.FUSED, Form.MASKED):
        mask = graph.constant(np.zeros((batch, 1, tokens, tokens), np.float32))
        rest = (None, None, mask) if kernel.form is Form.MASKED else ()
        made = graph.one("MultiHeadAttention", q, k, v, *rest, domain=MICROSOFT, num_heads=heads)
        return graph.built(made)
    apart = graph.constant(np.array([batch, tokens, heads, size]))
    turned = [
        graph.one("Transpose", graph.one("Reshape", value, apart), perm=perm)
        for value, perm in ((q, (0, 2, 1, 3)), (k, (0, 2, 3, 1)), (v, (0, 2, 1, 3)))
    ]
    scaled = graph.one("Mul", turned[0], graph.constant(np.array(np.float32(1 / math.sqrt(size)))))
    weights = graph.one("Softmax", graph.one("MatMul", scaled, turned[1]), axis=-1)
    mixed = graph.one("Transpose", graph.one("MatMul", weights, turned[2]), perm=(0, 2, 1, 3))
    joined = graph.constant(np.array([batch, tokens, heads * size]))
    return graph.built(graph.one("Reshape", mixed, joined))


def conversion_model(kernel: Kernel, shape: Shape) -> Built:
    """Return the model of a conversion of `elements` values between float and uint8 codes or float16."""
    graph = Builder()
    if kernel.operation is Operation.CAST:
        x = graph.input(graph.normal(*shape))
        return graph.built(graph.one("Cast", x, to=int(ir.DataType.FLOAT16)), ir.DataType.FLOAT16)
    scale, zero = graph.constant(_SCALE), graph.constant(_ZERO)
    if kernel.operation is Operation.DEQUANTIZE:
        x = graph.input(graph.rng.integers(0, 256, shape, np.uint8))
        return graph.built(graph.one("DequantizeLinear", x, scale, zero))
    x = graph.input(graph.normal(*shape))
    if kernel.form is Form.DYNAMIC:
        made = graph.add("DynamicQuantizeLinear", x, outputs=3)[0]
    else:
        made = graph.one("QuantizeLinear", x, scale, zero)
    return graph.built(made, ir.DataType.UINT8)
