# SPDX-License-Identifier: Apache-2.0
"""Models of one matrix product in each of its forms: x [rows, depth] times a constant weight
[depth, columns]. The graphs are those that the passes emit."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from splitfold.runtime.costs.builder import MICROSOFT, Builder, Built
from splitfold.runtime.costs.kernel import Form, Kernel, Shape

__all__ = ["linear_model"]

_SCALE = np.float32(0.05)
_ZERO = np.uint8(128)


def linear_model(kernel: Kernel, shape: Shape) -> Built:
    """Return the model of a form of MatMul.

    Args:
        shape: rows, depth, columns.
    """
    rows, depth, columns = shape
    graph = Builder()
    x = graph.input(graph.normal(rows, depth))
    if kernel.form is Form.FLOAT:
        return graph.built(graph.one("MatMul", x, graph.constant(graph.normal(depth, columns))))
    if kernel.form is Form.BLOCKS:
        return graph.built(_blocks(graph, x, kernel, depth, columns))
    codes = graph.rng.integers(-127, 128, (depth, columns), np.int8)
    weight, scales = graph.constant(codes), graph.constant(np.full(columns, _SCALE))
    zeros = graph.constant(np.zeros(columns, np.int8))
    if kernel.form is Form.DYNAMIC_INT8:
        return graph.built(_dynamic(graph, x, weight, scales, zeros))
    scale, zero = graph.constant(np.array(_SCALE)), graph.constant(np.array(_ZERO))
    quantized = graph.one("QuantizeLinear", x, scale, zero)
    if kernel.form is Form.STATIC_INT8:
        inputs = (quantized, weight, scale, scales, zero, zeros)
        return graph.built(graph.one("MatMulIntegerToFloat", *inputs, domain=MICROSOFT))
    back = graph.one("DequantizeLinear", quantized, scale, zero)
    return graph.built(
        graph.one("MatMul", back, graph.one("DequantizeLinear", weight, scales, zeros, axis=1))
    )


def _dynamic(graph: Builder, x: ir.Value, weight: ir.Value, scales: ir.Value, zeros: ir.Value) -> ir.Value:
    codes, scale, zero = graph.add("DynamicQuantizeLinear", x, outputs=3)
    product = graph.one("MatMulInteger", codes, weight, zero, zeros)
    both = graph.one("Mul", scale, scales)
    return graph.one("Mul", graph.one("Cast", product, to=int(ir.DataType.FLOAT)), both)


def _blocks(graph: Builder, x: ir.Value, kernel: Kernel, depth: int, columns: int) -> ir.Value:
    blocks = -(-depth // kernel.block)
    codes = graph.rng.integers(0, 256, (columns, blocks, kernel.block * kernel.bits // 8), np.uint8)
    inputs = [x, graph.constant(codes), graph.constant(np.full(columns * blocks, _SCALE))]
    if kernel.zero_points:
        size = columns * -(-blocks * kernel.bits // 8)
        inputs.append(graph.constant(graph.rng.integers(0, 256, size, np.uint8)))
    attributes: dict[str, Any] = {"K": depth, "N": columns, "bits": kernel.bits, "block_size": kernel.block}
    return graph.one("MatMulNBits", *inputs, domain=MICROSOFT, accuracy_level=kernel.level, **attributes)
