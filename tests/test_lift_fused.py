# SPDX-License-Identifier: Apache-2.0
"""Fused and low-bit operators of the runtime: the lifted model gives what the runtime gives."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch", reason="lifting needs the extra 'torch'")

from lifting import largest_difference, one_node
from onnx import TensorProto

from splitfold.runtime.feeds import Array
from splitfold.runtime.lift.table import ROWS

F = TensorProto.FLOAT
I8, U8 = TensorProto.INT8, TensorProto.UINT8
Case = tuple[ir.Model, dict[str, Array]]


def _normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return (scale * np.random.default_rng([seed, *shape]).standard_normal(shape)).astype(np.float32)


def _codes(*shape: int, kind: type = np.uint8, seed: int = 0) -> Array:
    low, high = (0, 256) if kind is np.uint8 else (-128, 128)
    return np.random.default_rng([seed, *shape]).integers(low, high, shape).astype(kind)


def _case(operator: str, inputs: dict[str, Array], *weights: Array | None, **options: object) -> Case:
    """A case of graph inputs, then initializers; it gives a float `y` unless `outputs` says."""
    named = {f"w{index}": array for index, array in enumerate(weights)}
    outputs = options.pop("outputs", {"y": F})
    return one_node(operator, {**inputs, **named}, outputs, fed=len(inputs), **options)  # type: ignore[arg-type]


def _scalar(value: float) -> Array:
    return np.array(value, np.float32)


X = _normal(2, 5, 8)
MASK = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], np.int32)


def fused_cases() -> dict[str, Case]:
    wide = {"x": X}
    pair = {"x": X, "s": _normal(2, 5, 8, seed=1)}
    norm = (_normal(8, seed=2), _normal(8, seed=3))
    heads = {"q": _normal(2, 5, 8, seed=4), "k": _normal(2, 6, 8, seed=5), "v": _normal(2, 6, 8, seed=6)}
    image = {"x": _normal(1, 3, 6, 6)}
    tokens = {"ids": np.array([[1, 4, 2]], np.int32), "kinds": np.array([[0, 0, 1]], np.int32)}
    both = {"y": F, " ": F, "  ": F, "total": F}
    angles = _normal(10, 2, seed=7)
    return {
        "FusedMatMul": _case("FusedMatMul", {"a": _normal(2, 4, 3), "b": _normal(2, 5, 4)}, transA=1,
                             transB=1, alpha=0.5),
        "FusedGemm": _case("FusedGemm", {"a": _normal(3, 4)}, _normal(5, 4), _normal(5), transB=1,
                           activation="LeakyRelu", activation_alpha=0.2),
        "FusedConv": _case("FusedConv", image, _normal(4, 3, 3, 3), _normal(4), activation="Relu",
                           pads=[1, 1, 1, 1]),
        "Gelu": _case("Gelu", wide),
        "BiasGelu": _case("BiasGelu", wide, norm[0]),
        "FastGelu": _case("FastGelu", wide, norm[0]),
        "QuickGelu": _case("QuickGelu", wide, alpha=1.5),
        "SkipLayerNormalization": _case("SkipLayerNormalization", pair, *norm, _normal(8, seed=8),
                                        epsilon=1e-5, outputs=both),
        "SkipSimplifiedLayerNormalization": _case("SkipSimplifiedLayerNormalization", pair, norm[0],
                                                  epsilon=1e-6),
        "EmbedLayerNormalization": _case("EmbedLayerNormalization", tokens, _normal(9, 8), _normal(6, 8),
                                         _normal(2, 8), *norm, outputs={"y": F, "counts": TensorProto.INT32}),
        "Attention": _case("Attention", wide, _normal(8, 24), _normal(24), MASK, num_heads=2),
        "Attention, causal": _case("Attention", wide, _normal(8, 24), _normal(24), num_heads=2,
                                   unidirectional=1),
        "MultiHeadAttention": _case("MultiHeadAttention", heads, _normal(24), num_heads=2),
        "MultiHeadAttention, mask": _case("MultiHeadAttention", heads, None,
                                          np.array([[1, 1, 1, 1, 0, 0], [1] * 6], np.int32), num_heads=2),
        "RotaryEmbedding": _case("RotaryEmbedding", {"x": _normal(2, 5, 8),
                                                     "at": np.tile(np.arange(5), (2, 1)).astype(np.int64)},
                                 np.cos(angles), np.sin(angles), num_heads=2),
        "SimplifiedLayerNormalization": _case("SimplifiedLayerNormalization", wide, norm[0], domain="",
                                              epsilon=1e-6, axis=-1),
    }  # fmt: skip


def quantized_cases() -> dict[str, Case]:
    codes = {"a": _codes(3, 8)}
    image = {"a": _codes(1, 4, 6, 6)}
    ours = (_scalar(0.02), np.array(120, np.uint8))
    other = (_codes(3, 8, seed=1), _scalar(0.03), np.array(130, np.uint8))
    out = (_scalar(0.05), np.array(128, np.uint8))
    weight = _codes(8, 4, kind=np.int8)
    scales, middles = np.linspace(0.01, 0.04, 4, dtype=np.float32), np.zeros(4, np.int8)
    eight = {"y": U8}
    return {
        "MatMulIntegerToFloat": _case("MatMulIntegerToFloat", codes, weight, _scalar(0.02), scales, ours[1],
                                      middles, _normal(4)),
        "DynamicQuantizeMatMul": _case("DynamicQuantizeMatMul", {"x": X}, weight, scales, middles,
                                       _normal(4)),
        "QGemm": _case("QGemm", codes, *ours, _codes(8, 4, kind=np.int8), _scalar(0.01), np.array(0, np.int8),
                       np.arange(4, dtype=np.int32), *out, outputs=eight),
        "QGemm, float": _case("QGemm", codes, *ours, _codes(8, 4, kind=np.int8), _scalar(0.01),
                              np.array(0, np.int8), np.arange(4, dtype=np.int32)),
        "QLinearAdd": _case("QLinearAdd", codes, *ours, *other, *out, outputs=eight),
        "QLinearMul": _case("QLinearMul", codes, *ours, *other, *out, outputs=eight),
        "QLinearSigmoid": _case("QLinearSigmoid", codes, *ours, _scalar(1 / 256), np.array(0, np.uint8),
                                outputs=eight),
        "QLinearLeakyRelu": _case("QLinearLeakyRelu", codes, *ours, *out, alpha=0.1, outputs=eight),
        "QLinearSoftmax": _case("QLinearSoftmax", codes, *ours, _scalar(1 / 256), np.array(0, np.uint8),
                                axis=-1, opset=13, outputs=eight),
        "QLinearGlobalAveragePool": _case("QLinearGlobalAveragePool", image, *ours, *out, outputs=eight),
        "QLinearAveragePool": _case("QLinearAveragePool", image, *ours, *out, kernel_shape=[2, 2],
                                    strides=[2, 2], outputs=eight),
        "QLinearConcat": _concat(),
        "QuantizeLinear": _case("QuantizeLinear", {"x": X}, _scalar(0.1), np.array(100, np.uint8),
                                outputs=eight),
        "DequantizeLinear": _case("DequantizeLinear", codes, _scalar(0.1), np.array(100, np.uint8)),
        "MatMulNBits, 2 bits": _nbits(2, True),
        "MatMulNBits, 4 bits": _nbits(4, True),
        "MatMulNBits, 8 bits": _nbits(8, False),
        "MatMulNBits, no zero points": _nbits(4, False),
        "GatherBlockQuantized": _gather(),
    }  # fmt: skip


def _concat() -> Case:
    zero = np.array(128, np.uint8)
    parts = {"a": _codes(3, 8), "a_scale": _scalar(0.02), "a_zero": np.array(120, np.uint8)}
    parts |= {"b": _codes(3, 4, seed=1), "b_scale": _scalar(0.1), "b_zero": zero}
    arrays = {"scale": _scalar(0.05), "zero": zero, **parts}
    return one_node("QLinearConcat", arrays, {"y": U8}, first=2, axis=1)


def _nbits(bits: int, with_zeros: bool) -> Case:
    """A product over 40 columns in blocks of 16: the last block is not full."""
    rows, blocks = 6, 3
    packed = _codes(rows, blocks, 16 * bits // 8)
    zeros = _codes(rows, -(-blocks * bits // 8), seed=3) if with_zeros else None
    weights = (packed, np.abs(_normal(rows, blocks)) + 0.1, zeros)
    options = {"K": 40, "N": rows, "bits": bits, "block_size": 16}
    return _case("MatMulNBits", {"x": _normal(2, 3, 40)}, *weights, **options)


def _gather() -> Case:
    ids = np.array([[1, 7], [0, 9]], np.int64)
    arrays = {
        "table": _codes(10, 16),
        "ids": ids,
        "scales": np.abs(_normal(10, 2)),
        "zeros": _codes(10, 1, seed=3),
    }
    options = {"bits": 4, "block_size": 16, "gather_axis": 0, "quantize_axis": 1}
    return one_node("GatherBlockQuantized", arrays, {"y": F}, first=1, **options)


@pytest.mark.parametrize("name", fused_cases())
def test_fused_operators(name: str) -> None:
    model, feeds = fused_cases()[name]
    assert largest_difference(model, feeds) < 2e-5


@pytest.mark.parametrize("name", quantized_cases())
def test_quantized_operators(name: str) -> None:
    model, feeds = quantized_cases()[name]
    assert largest_difference(model, feeds) < 2e-5


def test_every_row_of_the_runtimes_domain_is_tested() -> None:
    tested = {
        node.op_type
        for model, _ in [*fused_cases().values(), *quantized_cases().values()]
        for node in model.graph
    }
    assert set(ROWS["com.microsoft"]) <= tested
