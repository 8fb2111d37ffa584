# SPDX-License-Identifier: Apache-2.0
"""Straight-through gradients of lifted quantizers, and lifted models that our own passes quantized."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch", reason="lifting needs the extra 'torch'")

import torch
from encoder import encoder, token_batches
from lifting import largest_difference, model_of

from splitfold.compiler import Tolerance, compile, presets
from splitfold.runtime.feeds import Array
from splitfold.runtime.lift import lift

HEAD = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>'
X = np.array([[-40.0, -1.26, -0.24, 0.0, 0.2, 1.3, 40.0]], np.float32)


def _scalar(value: float) -> Array:
    return np.array(value, np.float32)


def _fake(kind: type, **weights: Array) -> ir.Model:
    text = (
        f"{HEAD} m (float[1, 7] x) => (float[1, 7] y)"
        " { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }"
    )
    return model_of(text, s=_scalar(0.1), z=np.array(3, kind), **weights)


@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_rounding_passes_gradients_and_saturation_stops_them(kind: type) -> None:
    """y = s (clip(round(x / s) + z, low, high) - z): dy/dx is 1 inside and 0 outside (arXiv:1308.3432)."""
    lifted, x = lift(_fake(kind)), torch.from_numpy(X).requires_grad_()
    assert largest_difference(_fake(kind), {"x": X}, lifted) == 0
    (y,) = lifted.module(x)
    y.backward(torch.arange(1.0, 8.0).reshape(1, 7))
    codes = np.round(X / np.float32(0.1)) + 3
    limits = np.iinfo(kind)
    inside = (codes >= limits.min) & (codes <= limits.max)
    assert not inside.all()
    np.testing.assert_array_equal(x.grad.numpy(), np.where(inside, np.arange(1.0, 8.0), 0))


def test_quantized_numbers_as_an_output_are_integers() -> None:
    model = model_of(
        f"{HEAD} m (float[1, 7] x) => (int8[1, 7] q) {{ q = QuantizeLinear(x, s, z) }}",
        s=_scalar(0.1),
        z=np.array(3, np.int8),
    )
    assert lift(model).run({"x": X})["q"].dtype is torch.int8
    assert largest_difference(model, {"x": X}) == 0


@pytest.mark.parametrize("terms", [64, 4096])
def test_integer_products_are_exact_and_pass_gradients(terms: int) -> None:
    """The largest codes: sums of 4096 products do not fit into a float32."""
    text = (
        f"{HEAD} m (float[2, {terms}] x) => (int32[2, 3] p, float[2, 3] y) {{ q = QuantizeLinear(x, s, z)"
        " p = MatMulInteger(q, w, z, wz) f = Cast<to = 1>(p) y = Mul(f, t) }"
    )
    random = np.random.default_rng(terms)
    weights = {"w": random.integers(100, 128, (terms, 3)).astype(np.int8), "wz": np.array(-1, np.int8)}
    model = model_of(text, s=_scalar(0.01), z=np.array(0, np.uint8), t=_scalar(0.001), **weights)
    x = (2.3 + 0.1 * random.random((2, terms))).astype(np.float32)
    lifted = lift(model)
    assert largest_difference(model, {"x": x}, lifted) == 0
    held = torch.from_numpy(x).requires_grad_()
    lifted.module(held)[1].sum().backward()
    slope = (weights["w"].astype(np.float64) + 1).sum(1) * 0.001 / 0.01
    np.testing.assert_allclose(held.grad.numpy(), np.tile(slope, (2, 1)), rtol=1e-5)


def test_low_bit_weights_pass_gradients() -> None:
    """dy/dx of x W^T is W, W being (code - 8) * scale, codes the lower half of each byte first."""
    text = (
        f"{HEAD} m (float[1, 16] x) => (float[1, 2] y) {{"
        " y = com.microsoft.MatMulNBits<K = 16, N = 2, bits = 4, block_size = 16>(x, w, s) }"
    )
    packed = np.random.default_rng(0).integers(0, 256, (2, 1, 8)).astype(np.uint8)
    model = model_of(text, w=packed, s=np.array([0.5, 2.0], np.float32))
    x = torch.ones(1, 16, requires_grad=True)
    lift(model).module(x)[0][0, 1].backward()
    codes = np.stack([packed[1, 0] & 15, packed[1, 0] >> 4], -1).reshape(-1)
    np.testing.assert_array_equal(x.grad.numpy()[0], (codes.astype(np.float32) - 8) * 2)


def test_blocked_four_bit_weights() -> None:
    text = (
        f"{HEAD} m (float[3, 8] x) => (float[3, 4] y) {{"
        " d = DequantizeLinear<axis = 0, block_size = 4>(w, s, z) y = MatMul(x, d) }"
    )
    random = np.random.default_rng(0)
    model = model_of(text, s=random.random((2, 4)).astype(np.float32))
    for name, shape in (("w", (8, 4)), ("z", (2, 4))):
        codes = ir.tensor(random.integers(0, 16, shape).astype(ir.DataType.UINT4.numpy()), name=name)
        value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value, value.dtype = codes, ir.DataType.UINT4
        model.graph.register_initializer(value)
    assert largest_difference(model, {"x": random.standard_normal((3, 8)).astype(np.float32)}) < 1e-5


PIPELINES = {
    "exact": presets.exact(),
    "int8": presets.int8(),
    "int8-dynamic": presets.int8_dynamic(),
    "int4": presets.int4(),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_models_that_the_passes_wrote(name: str) -> None:
    model, batches = ir.from_proto(encoder()), token_batches(4)
    compiled = compile(
        model, pipeline=PIPELINES[name], calibration=batches, tolerance=Tolerance(cosine=None)
    ).model
    lifted = lift(compiled)
    bound = 1e-5 if name == "exact" else 0.02  # a number on an edge may round the other way
    assert largest_difference(compiled, batches[0], lifted) < bound
