# SPDX-License-Identifier: Apache-2.0
"""4-bit blocks in int8: the arithmetic, what the runtime makes of it, and bytes that stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from small import mlp, samples

from splitfold.compiler import compile
from splitfold.passes.base import Context
from splitfold.passes.pipeline import Pipeline
from splitfold.runtime.feeds import Array
from splitfold.runtime.session import Session, optimized_graph
from splitfold.runtime.target import Target

ROWS, BLOCKS, BLOCK = 6, 3, 16


def blocks(codes: Array, scales: Array, zeros: Array | None) -> ir.Model:
    """One MatMulNBits; `codes` and `zeros` are packed."""
    more = "" if zeros is None else ", zeros"
    model = ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
        m (float[n, {BLOCKS * BLOCK}] x) => (float[n, {ROWS}] y) {{
            y = com.microsoft.MatMulNBits<K: int = {BLOCKS * BLOCK}, N: int = {ROWS}, bits: int = 4,
                block_size: int = {BLOCK}, accuracy_level: int = 4>(x, codes, scales{more})
        }}
    """)
    node = model.graph[0]
    held = {"codes": codes, "scales": scales} | ({} if zeros is None else {"zeros": zeros})
    for position, (name, array) in enumerate(held.items(), 1):
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        value.const_value = tensor
        model.graph.register_initializer(value)
        node.replace_input_with(position, value)
    return model


def drawn(*, zeros: bool) -> tuple[Array, Array, Array | None, Array]:
    """Packed codes, scales, packed zero points or none, and the weight [N, K] that they stand for."""
    rng = np.random.default_rng(3)
    codes = rng.integers(5, 11, (ROWS, BLOCKS, BLOCK), np.uint8)
    for row in range(ROWS):  # extremes in one half of a byte each
        codes[row, 0, row % 2], codes[row, 1, 1 - row % 2] = 15, 0
    codes[2] = 8  # a column of zeros, where there are no zero points
    scales = rng.uniform(0.01, 0.2, (ROWS, BLOCKS)).astype(np.float32)
    points = rng.integers(0, 16, (ROWS, BLOCKS), np.uint8) if zeros else np.full((ROWS, BLOCKS), 8, np.uint8)
    padded = np.concatenate([points, np.zeros((ROWS, 1), np.uint8)], axis=1)
    packed = padded[:, ::2] | padded[:, 1::2] << 4
    weight = (codes.astype(np.float32) - points[..., None]) * scales[..., None]
    halves = codes[..., ::2] | codes[..., 1::2] << 4
    return halves, scales, packed if zeros else None, weight.reshape(ROWS, -1)


@pytest.mark.parametrize("zeros", [True, False])
def test_the_int8_weight_is_the_rounded_4_bit_weight(zeros: bool) -> None:
    codes, scales, points, weight = drawn(zeros=zeros)
    model = blocks(codes, scales, points)
    Pipeline.parse("widen-blocks").run(model, Context())
    turned = next(node for node in model.graph if node.op_type == "QuantizeLinear")
    found = Session(model, taps=[turned.outputs[0].name or ""])
    x = np.random.default_rng(1).standard_normal((9, BLOCKS * BLOCK)).astype(np.float32)
    outputs = found.run({"x": x}, taps=[turned.outputs[0].name or ""])
    peaks = np.abs(weight).max(1)
    steps = np.where(peaks > 0, peaks / 127, 1).astype(np.float32)
    exact = (weight / steps[:, None]).T
    made = outputs[turned.outputs[0].name or ""]
    assert made.dtype == np.int8
    assert np.abs(made - exact).max() < 0.5001  # half a step; at a tie either side is right
    assert np.abs(made).max() == 127
    low, high = min(x.min(), 0), max(x.max(), 0)
    step = np.float32((high - low) / 255)
    zero = np.rint(-low / step)
    quantized = np.clip(np.rint(x / step) + zero, 0, 255) - zero
    product = quantized @ made.astype(np.float64) * step * steps
    np.testing.assert_allclose(outputs["y"], product, rtol=1e-4, atol=1e-4)


def test_the_runtime_folds_it_to_one_int8_product() -> None:
    codes, scales, points, _ = drawn(zeros=True)
    model = blocks(codes, scales, points)
    Pipeline.parse("widen-blocks").run(model, Context())
    assert [node.op_type for node in optimized_graph(model, Target.cpu()).graph] == ["DynamicQuantizeMatMul"]


def test_codes_and_scales_stay_byte_for_byte() -> None:
    codes, scales, points, _ = drawn(zeros=True)
    model = blocks(codes, scales, points)
    Pipeline.parse("widen-blocks").run(model, Context())
    kept: dict[str, Any] = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert kept["codes_codes"].tobytes() == codes.tobytes()
    assert kept["codes_scales"].tobytes() == scales.tobytes()
    assert kept["codes_codes"].dtype is ir.DataType.UINT4


def test_compiled_layers_are_low_bit_kernels() -> None:
    blocked = compile(mlp(), pipeline="canonicalize,quantize-weights{block=16}", speed=None)
    widened = compile(blocked.model, pipeline="widen-blocks", speed=None)
    kernels = {name: found["kernel"] for name, found in widened.manifest["realised"].items()}
    assert kernels
    assert set(kernels.values()) <= {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
    before, after = (artifact.session().run({"x": samples(8)})["y"] for artifact in (blocked, widened))
    assert np.abs(after - before).max() < 0.05 * np.abs(before).max()
