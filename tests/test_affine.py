# SPDX-License-Identifier: Apache-2.0
"""Quantization arithmetic: properties of grids, kernels against integers, calibrators against plain ones."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from seeded import parse_graph

from splitfold.passes.affine import (
    ActivationGrid,
    activation_grid,
    dequantize_blocks,
    pack_codes,
    quantize_blocks,
    quantize_rows,
    quantize_weight,
    unpack_codes,
)
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.session import Optimization, Session

settings.register_profile(
    "splitfold", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("splitfold")

FLOATS = st.floats(-1e6, 1e6, width=32)
MATRICES = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=FLOATS)
SLACK = 1e-5
"""Relative rounding of float32 that half a step may be exceeded by."""


def half_step(scale: Array | np.float32, values: Array) -> Array:
    return np.asarray(np.abs(scale) * (0.5 + SLACK) + SLACK * np.abs(values) * 0.1 + 1e-37)


# Activation grids


@given(
    st.tuples(FLOATS, FLOATS), st.booleans(), hnp.arrays(np.float32, 50, elements=st.floats(0, 1, width=32))
)
def test_activations_round_trip_within_half_a_step(
    ends: tuple[float, float], symmetric: bool, at: Array
) -> None:
    low, high = min(*ends, 0.0), max(*ends, 0.0)
    grid = activation_grid(low, high, symmetric=symmetric)
    values = (low + at * (high - low)).astype(np.float32)
    error = np.abs(grid.round_trip(values) - values)
    # the ends of an asymmetric grid are off by up to half a step more, as its zero point is rounded
    inside = (
        (values > low + grid.scale) & (values < high - grid.scale) if not symmetric else np.ones(50, bool)
    )
    assert (error[inside] <= half_step(grid.scale, values)[inside]).all()
    assert (error <= 2 * half_step(grid.scale, values)).all()


@given(FLOATS, FLOATS, st.booleans())
def test_zero_is_exact(first: float, second: float, symmetric: bool) -> None:
    grid = activation_grid(min(first, second), max(first, second), symmetric=symmetric)
    assert grid.round_trip(np.zeros(3, np.float32)).tolist() == [0.0, 0.0, 0.0]
    assert 0 < grid.scale < np.inf
    assert (grid.zero_point == 128) or not symmetric


@given(
    st.floats(-100, 0, width=32),
    st.floats(0, 100, width=32),
    hnp.arrays(np.float32, 30, elements=st.floats(-200, 200, width=32)),
)
def test_round_trip_is_the_runtimes(low: float, high: float, values: Array) -> None:
    assume(high - low > 1e-3)
    grid = activation_grid(low, high)
    result = run(
        "net (float[30] x, float s, uint8 z) => (float[30] y)"
        " { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }",
        {"x": values, "s": np.array(grid.scale), "z": np.array(grid.zero_point)},
    )
    np.testing.assert_array_equal(grid.round_trip(values), result["y"])


# Weights


@given(MATRICES, st.sampled_from([127, 63]), st.sampled_from([0, 1, None]))
def test_weights_round_trip_within_half_a_step(weight: Array, levels: int, axis: int | None) -> None:
    codes, scale = quantize_weight(weight, axis, levels=levels)
    assert codes.dtype == np.int8
    assert np.abs(codes.astype(int)).max(initial=0) <= levels
    spread = scale if axis is None else np.expand_dims(scale, 1 - axis)
    assert (np.abs(codes * spread - weight) <= half_step(spread, weight)).all()
    peaks = np.abs(weight) == np.abs(weight).max(axis=None if axis is None else 1 - axis, keepdims=True)
    used = np.broadcast_to(spread, weight.shape)[peaks] > 1e-30
    assert (np.abs(codes.astype(int))[peaks][used & (weight[peaks] != 0)] == levels).all()


@given(MATRICES)
def test_rows_round_trip_within_half_a_step(table: Array) -> None:
    codes, scale = quantize_rows(table)
    assert scale.shape == (len(table), 1)
    assert (np.abs(codes * scale - table) <= half_step(scale, table)).all()


BLOCKS = st.tuples(
    st.sampled_from([(2, 4), (4, 16), (8, 256), (4, 8)]), st.sampled_from([16, 32]), st.booleans()
)


@given(MATRICES, BLOCKS)
def test_blocks_round_trip_within_half_a_step(matrix: Array, how: tuple[tuple[int, int], int, bool]) -> None:
    (bits, levels), block, symmetric = how
    q = quantize_blocks(matrix, bits=bits, block=block, symmetric=symmetric, levels=levels)
    n, k = matrix.shape
    assert q.codes.shape == (n, -(-k // block), block)
    assert len(np.unique(q.codes)) <= levels
    zero = np.full(q.scales.shape, 2 ** (bits - 1)) if q.zero_points is None else q.zero_points.astype(int)
    low, high = (
        (2 ** (bits - 1) - levels // 2, 2 ** (bits - 1) + levels // 2 - 1) if symmetric else (0, levels - 1)
    )
    assert q.codes.min() >= low
    assert q.codes.max() <= high
    assert ((zero >= low) & (zero <= high)).all(), "zero has no code"
    steps = np.repeat(np.abs(q.scales), block, axis=1)[:, :k]
    clipped = (
        2.0 if symmetric else 1.0
    )  # the side away from the peak has one code less; a zero point is rounded
    assert (
        np.abs(dequantize_blocks(q) - matrix)
        <= (clipped + 0.001) * half_step(steps, matrix) + (0 if symmetric else steps / 2)
    ).all()
    padding = q.codes.reshape(n, -1)[:, k:]
    np.testing.assert_array_equal(padding, np.repeat(zero, block, axis=1)[:, k:])


@given(MATRICES)
def test_three_bits_use_eight_codes(matrix: Array) -> None:
    symmetric = quantize_blocks(matrix, bits=4, block=16, symmetric=True, levels=8)
    skewed = quantize_blocks(matrix, bits=4, block=16, symmetric=False, levels=8)
    assert set(np.unique(symmetric.codes)) <= set(range(4, 12))
    assert set(np.unique(skewed.codes)) <= set(range(8))


@given(st.sampled_from([2, 4, 8]), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_packing_is_invertible(bits: int, length: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (3, 2, length)).astype(np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (3, 2, -(-length * bits // 8))
    np.testing.assert_array_equal(unpack_codes(packed, bits, length), codes)
    assert packed[0, 0, 0] & (2**bits - 1) == codes[0, 0, 0], "the first code is in the lowest bits"


# Kernels


def run(text: str, feeds: Feeds, *, opset: str = '"" : 20') -> dict[str, Array]:
    model = ir.from_proto(parse_graph(f"<ir_version: 10, opset_import: [{opset}]>\n{text}"))
    return Session(model, threads=1, optimization=Optimization.OFF).run(feeds)


def matrix(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


MICROSOFT = '"" : 20, "com.microsoft" : 1'


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("k", [64, 37])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_matmul_nbits_computes_what_the_codes_say(bits: int, k: int, symmetric: bool) -> None:
    q = quantize_blocks(matrix(bits, 6, k), bits=bits, block=32, symmetric=symmetric)
    blocks, packed = q.codes.shape[1], pack_codes(q.codes, bits)
    zeros = None if q.zero_points is None else pack_codes(q.zero_points, bits)
    declared, name = ("", "") if zeros is None else (f", uint8[6,{zeros.shape[1]}] z", ", z")
    feeds = {"w": packed, "s": q.scales} | ({} if zeros is None else {"z": zeros})

    def product(x: Array, level: int) -> Array:
        attributes = f"K = {k}, N = 6, bits = {bits}, block_size = 32, accuracy_level = {level}"
        return run(
            f"net (float[m,{k}] x, uint8[6,{blocks},{packed.shape[2]}] w, float[6,{blocks}] s{declared})"
            f" => (float[m,6] y) {{ y = com.microsoft.MatMulNBits<{attributes}>(x, w, s{name}) }}",
            {"x": x, **feeds},
            opset=MICROSOFT,
        )["y"]

    weight = dequantize_blocks(q)
    np.testing.assert_allclose(product(np.eye(k, dtype=np.float32), 1).T, weight, rtol=1e-6, atol=1e-7)
    x = matrix(k, 9, k)
    # level 4 rounds activations to int8, at worst with one scale a row
    bound = np.abs(x).max(1, keepdims=True) / 127 * (0.5 + SLACK) * np.abs(weight).sum(1) + 1e-5
    assert (np.abs(product(x, 4) - x @ weight.T) <= bound).all()


@pytest.mark.parametrize("block", [16, 32])
def test_gather_block_quantized_reads_rows_bit_for_bit(block: int) -> None:
    q = quantize_blocks(matrix(1, 9, 64), bits=4, block=block, symmetric=False)
    packed = pack_codes(q.codes.reshape(9, -1), 4)
    zeros = pack_codes(np.asarray(q.zero_points), 4)
    ids = np.array([[8, 0, 3], [3, 3, 1]], np.int64)
    result = run(
        f"net (uint8[9,32] t, int64[2,3] i, float[9,{64 // block}] s, uint8[9,{zeros.shape[1]}] z)"
        f" => (float[2,3,64] y) {{ y = com.microsoft.GatherBlockQuantized"
        f"<bits = 4, block_size = {block}, gather_axis = 0, quantize_axis = 1>(t, i, s, z) }}",
        {"t": packed, "i": ids, "s": q.scales, "z": zeros},
        opset=MICROSOFT,
    )
    np.testing.assert_array_equal(result["y"], dequantize_blocks(q)[ids])


def test_matmul_integer_is_exact() -> None:
    codes, _ = quantize_weight(matrix(2, 40, 7), 1)
    rng = np.random.default_rng(3)
    x, zero = rng.integers(0, 256, (5, 40)).astype(np.uint8), np.array(113, np.uint8)
    result = run(
        "net (uint8[5,40] x, int8[40,7] w, uint8 z) => (int32[5,7] y) { y = MatMulInteger(x, w, z) }",
        {"x": x, "w": codes, "z": zero},
    )
    np.testing.assert_array_equal(result["y"], (x.astype(np.int64) - 113) @ codes.astype(np.int64))


def requantized(sums: Array, scale: Array, zero: int) -> Array:
    """Return uint8 codes of int32 sums as ONNX defines them: scaled, rounded half to even, saturated."""
    scaled = np.rint(sums.astype(np.float32) * scale.astype(np.float32))
    return np.asarray(np.clip(scaled + zero, 0, 255).astype(np.uint8))


def test_qlinear_matmul_is_exact() -> None:
    codes, scales = quantize_weight(matrix(4, 24, 6), 1)
    x_grid, y_grid = activation_grid(-3, 2), activation_grid(-10, 12)
    x = np.random.default_rng(5).integers(0, 256, (8, 24)).astype(np.uint8)
    result = run(
        "net (uint8[8,24] x, float xs, uint8 xz, int8[24,6] w, float[6] ws, int8[6] wz, float ys, uint8 yz)"
        " => (uint8[8,6] y) { y = QLinearMatMul(x, xs, xz, w, ws, wz, ys, yz) }",
        {"x": x, "w": codes, "ws": scales, "wz": np.zeros(6, np.int8)}
        | _scalars("x", x_grid)
        | _scalars("y", y_grid),
    )
    sums = (x.astype(np.int64) - int(x_grid.zero_point)) @ codes.astype(np.int64)
    expected = requantized(sums, x_grid.scale * scales / y_grid.scale, int(y_grid.zero_point))
    np.testing.assert_array_equal(result["y"], expected)


def test_qlinear_conv_is_exact() -> None:
    codes, scales = quantize_weight(matrix(6, 4, 3, 1, 1), 0)
    x_grid, y_grid = activation_grid(-3, 2), activation_grid(0, 6)
    rng = np.random.default_rng(7)
    x, bias = rng.integers(0, 256, (2, 3, 5, 5)).astype(np.uint8), rng.integers(-900, 900, 4).astype(np.int32)
    result = run(
        "net (uint8[2,3,5,5] x, float xs, uint8 xz, int8[4,3,1,1] w, float[4] ws, int8[4] wz,"
        " float ys, uint8 yz, int32[4] b) => (uint8[2,4,5,5] y)"
        " { y = QLinearConv(x, xs, xz, w, ws, wz, ys, yz, b) }",
        {"x": x, "w": codes, "ws": scales, "wz": np.zeros(4, np.int8), "b": bias}
        | _scalars("x", x_grid)
        | _scalars("y", y_grid),
    )
    flat = x.astype(np.int64).transpose(0, 2, 3, 1) - int(x_grid.zero_point)
    sums = flat @ codes.astype(np.int64).reshape(4, 3).T + bias
    expected = requantized(sums, x_grid.scale * scales / y_grid.scale, int(y_grid.zero_point))
    np.testing.assert_array_equal(result["y"], expected.transpose(0, 3, 1, 2))


def _scalars(name: str, grid: ActivationGrid) -> dict[str, Array]:
    return {f"{name}s": np.array(grid.scale), f"{name}z": np.array(grid.zero_point)}


def test_codes_are_held_as_they_are_described() -> None:
    q = quantize_blocks(np.array([[0.0, 1.5, -0.5, 3.0]], np.float32), bits=4, block=16, symmetric=False)
    assert q.scales.tolist() == [[pytest.approx(3.5 / 15)]]
    assert q.zero_points is not None
    assert q.zero_points.tolist() == [[2]]
    assert q.codes[0, 0].tolist() == [2, 8, 0, 15] + [2] * 12
