# SPDX-License-Identifier: Apache-2.0
"""Range search and GPTQ, against plain loops from the papers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from splitfold.passes.affine import dequantize_blocks, held_blocks, quantize_blocks
from splitfold.passes.block_grid import BlockGrid, BlockLayout
from splitfold.passes.clip_search import AWQ_RATIOS, MSE_RATIOS, awq_clip, mse_grid
from splitfold.passes.gptq import Compensation, Ranges, compensated
from splitfold.passes.gram_loss import diagonal_blocks, normalised
from splitfold.runtime.feeds import Array

settings.register_profile(
    "splitfold", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("splitfold")

W4, W3, W2 = (
    BlockLayout(bits, 16, symmetric=False, levels=levels) for bits, levels in ((4, 16), (4, 8), (2, 4))
)
LAYOUTS = [
    W4,
    W3,
    W2,
    BlockLayout(4, 16, True, 16),
    BlockLayout(4, 32, True, 8),
    BlockLayout(8, 16, False, 256),
]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda v: f"{v.levels}-{v.block}-{v.symmetric}")
MATRICES = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=40),
    elements=st.floats(-1e4, 1e4, width=32),
)


def weights(n: int, k: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def tokens(count: int, k: int, seed: int = 1, rank: int | None = None) -> Array:
    """Correlated tokens, a few channels large."""
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((count, rank or k)) @ rng.standard_normal((rank or k, k))
    return np.asarray((factors + 0.2 * rng.standard_normal((count, k))) * np.exp(rng.standard_normal(k)))


def gram(x: Array) -> Array:
    return np.asarray(x.T @ x, np.float64)


def back(codes: Array, grid: BlockGrid, layout: BlockLayout, columns: int) -> Array:
    return dequantize_blocks(held_blocks(codes, grid, layout, columns=columns))


def nearest(matrix: Array, layout: BlockLayout) -> Array:
    q = quantize_blocks(
        matrix, bits=layout.bits, block=layout.block, symmetric=layout.symmetric, levels=layout.levels
    )
    return dequantize_blocks(q)


def output_error(matrix: Array, held: Array, x: Array) -> Array:
    """Squared error of each output channel over all tokens."""
    return np.asarray(np.square(x @ (held - matrix).T.astype(np.float64)).sum(0))


def plain_grid(low: float, high: float, levels: int) -> tuple[float, float]:
    """The asymmetric grid as written down: scale and zero point of a range that holds zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (levels - 1) or 1.0
    return scale, float(np.clip(np.rint(-low / scale), 0, levels - 1))


def plain_round(values: Array, scale: float, zero: float, levels: int) -> Array:
    codes = np.clip(np.rint(values / scale) + zero, 0, levels - 1)
    return np.asarray((codes - zero) * scale)


# Ranges by weight error


@pytest.mark.parametrize("layout", [W4, W3, W2], ids=["4 bits", "3 bits", "2 bits"])
def test_mse_finds_the_best_range_of_all(layout: BlockLayout) -> None:
    matrix = weights(9, 40)
    x = layout.blocked(matrix)
    found = mse_grid(x, layout).round_trip(x)
    for row in range(9):
        for start in range(0, 40, 16):
            part = matrix[row, start : start + 16].astype(np.float64)
            tries = []
            for ratio in MSE_RATIOS:
                scale, zero = plain_grid(ratio * part.min(), ratio * part.max(), layout.levels)
                tries.append(np.square(plain_round(part, scale, zero, layout.levels) - part).sum())
            error = np.square(found[row, start // 16, : len(part)] - part).sum()
            assert error == pytest.approx(min(tries), rel=1e-4)


@layouts
@given(matrix=MATRICES)
def test_mse_is_never_worse_than_the_whole_range(layout: BlockLayout, matrix: Array) -> None:
    x = layout.blocked(matrix)
    searched, whole = mse_grid(x, layout).round_trip(x), layout.grid(x).round_trip(x)
    errors = [np.square((held - x).astype(np.float64)).sum(-1) for held in (searched, whole)]
    assert (errors[0] <= errors[1] * (1 + 1e-5) + 1e-30).all()
    assert np.isfinite(searched).all()


def test_mse_gains_where_bits_are_few() -> None:
    matrix = weights(64, 256)
    layout = BlockLayout(2, 128, False, 4)
    x = layout.blocked(matrix)
    searched, whole = mse_grid(x, layout).round_trip(x), layout.grid(x).round_trip(x)
    assert np.square(searched - x).sum() < 0.7 * np.square(whole - x).sum()


def test_weighed_columns_count_as_often() -> None:
    """A column of weight 3 is worth as much as three equal columns."""
    matrix = weights(20, 12)
    twice = np.concatenate([matrix, matrix[:, :2], matrix[:, :2]], 1)
    plain = mse_grid(W2.blocked(twice), W2)
    counts = np.zeros((1, 16), np.float32)
    counts[0, :12] = 1
    counts[0, :2] = 3
    weighed = mse_grid(W2.blocked(matrix), W2, counts)
    np.testing.assert_array_equal(weighed.scales, plain.scales)


# Ranges by output error


@pytest.mark.parametrize("layout", [W4, W2], ids=["4 bits", "2 bits"])
def test_awq_clips_at_the_least_output_error_over_all_tokens(layout: BlockLayout) -> None:
    matrix, x = weights(7, 40), tokens(60, 40)
    grams = normalised(diagonal_blocks(gram(x), 16))
    clamped = awq_clip(layout.blocked(matrix), layout, grams)
    grid = layout.grid(clamped)
    held = grid.round_trip(clamped)
    for row in range(7):
        for start in range(0, 40, 16):
            part, seen = matrix[row, start : start + 16].astype(np.float64), x[:, start : start + 16]
            tries = []
            for ratio in (1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55):
                limit = np.abs(part).max() * ratio
                low, high = np.clip([part.min(), part.max()], -limit, limit)
                scale, zero = plain_grid(low, high, layout.levels)
                rounded = plain_round(np.clip(part, -limit, limit), scale, zero, layout.levels)
                tries.append(np.square(seen @ part - seen @ rounded).sum())
            mine = held[row, start // 16, : len(part)]
            assert np.square(seen @ part - seen @ mine).sum() == pytest.approx(min(tries), rel=1e-3)
    assert pytest.approx((1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)) == AWQ_RATIOS


@layouts
@given(matrix=MATRICES, seed=st.integers(0, 99))
def test_awq_is_never_worse_than_the_whole_range(layout: BlockLayout, matrix: Array, seed: int) -> None:
    x = tokens(30, matrix.shape[1], seed)
    grams = diagonal_blocks(gram(x), layout.block).astype(np.float64)
    blocks = layout.blocked(matrix)
    clamped = awq_clip(blocks, layout, normalised(grams))
    losses = []
    for held in (layout.grid(clamped).round_trip(clamped), layout.grid(blocks).round_trip(blocks)):
        error = (held - blocks).astype(np.float64)
        losses.append(np.einsum("ngb,gbc,ngc->ng", error, grams, error))
    assert (losses[0] <= losses[1] * (1 + 1e-3) + 1e-4 * losses[1].max(initial=0)).all()


# GPTQ


def test_gptq_by_hand() -> None:
    """Two equal inputs: what the first weight loses, the second makes up for."""
    matrix = np.zeros((1, 16), np.float32)
    matrix[0, [0, 1, 15]] = 0.4, 0.4, 15  # the last fixes the step at 1
    x = np.eye(16)
    x[:, 1] = x[:, 0]
    options = Compensation(damping=1e-6, ranges=Ranges.WHOLE)
    codes, grid = compensated(matrix, W4, gram(x), options)
    assert grid.scales.tolist() == [[1.0]]
    assert codes[0, 0, [0, 1, 15]].tolist() == [0, 1, 15], "0.4 + 0.4 is nearer to 1 than to 0"
    assert nearest(matrix, W4)[0, :2].tolist() == [0, 0]


def plain_gptq(matrix: Array, h: Array, layout: BlockLayout, damping: float) -> Array:
    """Optimal brain quantization in the order of the columns: after each, the inverse Hessian of what is left
    is found by elimination. No Cholesky factor, no stretches."""
    w = matrix.astype(np.float64).copy()
    h = h + damping * np.diag(h).mean() * np.eye(len(h))
    inverse = np.linalg.inv(h)
    held = np.zeros_like(w)
    n, k = w.shape
    for at in range(k):
        if at % layout.block == 0:
            ends = [(row.min(), row.max()) for row in w[:, at : at + layout.block]]
            grids = [plain_grid(low, high, layout.levels) for low, high in ends]
        for row in range(n):
            held[row, at] = plain_round(w[row, at], *grids[row], layout.levels)
        error = (w[:, at] - held[:, at]) / inverse[at, at]
        w[:, at:] -= np.outer(error, inverse[at, at:])
        inverse = inverse - np.outer(inverse[:, at], inverse[at]) / inverse[at, at]
    return held


@pytest.mark.parametrize("k", [12, 40, 300])
def test_gptq_is_the_plain_algorithm(k: int) -> None:
    matrix, x = weights(5, k), tokens(2 * k, k)
    options = Compensation(ranges=Ranges.WHOLE)
    codes, grid = compensated(matrix, W3, gram(x), options)
    expected = plain_gptq(matrix, gram(x), W3, options.damping)
    rows = output_error(matrix, expected, x) < output_error(matrix, nearest(matrix, W3), x)
    assert rows.sum() >= 4
    found = back(codes, grid, W3, k)
    np.testing.assert_allclose(found[rows], expected[rows], rtol=1e-3, atol=1e-5)


def test_order_by_activation_is_the_plain_algorithm_on_sorted_columns() -> None:
    """With blocks of one range, sorting the columns beforehand comes to the same."""
    matrix, x = weights(6, 16), tokens(50, 16)
    codes, grid = compensated(matrix, W4, gram(x), Compensation(act_order=True, ranges=Ranges.WHOLE))
    order = np.argsort(-np.diag(gram(x)))
    expected = plain_gptq(matrix[:, order], gram(x[:, order]), W4, 0.01)
    np.testing.assert_allclose(back(codes, grid, W4, 16)[:, order], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("ranges", Ranges)
@layouts
def test_gptq_beats_rounding_on_correlated_inputs(
    layout: BlockLayout, ranges: Ranges, act_order: bool
) -> None:
    matrix, x = weights(32, 100), tokens(150, 100, rank=20)
    codes, grid = compensated(matrix, layout, gram(x), Compensation(act_order=act_order, ranges=ranges))
    assert codes.min() >= grid.low
    assert codes.max() <= grid.high
    padding = codes.reshape(32, -1)[:, 100:]
    np.testing.assert_array_equal(padding, np.repeat(grid.zeros, layout.block, 1)[:, 100:])
    mine = output_error(matrix, back(codes, grid, layout, 100), x)
    rounded = output_error(matrix, nearest(matrix, layout), x)
    assert (mine <= rounded * 1.001).all()
    assert mine.sum() < 0.6 * rounded.sum()


def test_searched_ranges_help_at_two_bits() -> None:
    matrix, x = weights(64, 128), tokens(400, 128)
    errors = {}
    for ranges in Ranges:
        codes, grid = compensated(matrix, W2, gram(x), Compensation(ranges=ranges))
        errors[ranges] = output_error(matrix, back(codes, grid, W2, 128), x).sum()
    assert errors[Ranges.SEARCHED] < 0.8 * errors[Ranges.WHOLE]


def test_searched_ranges_cut_off_what_costs_little() -> None:
    """A weight ten times the others, in a column that hardly any input reaches, does not set the range."""
    matrix, x = weights(6, 16), np.random.default_rng(3).standard_normal((200, 16))
    matrix[:, 3] = 30
    for size, kept in ((1e-3, False), (1e3, True)):
        x[:, 3] = size
        _, grid = compensated(matrix, W4, gram(x), Compensation(damping=1e-9))
        assert ((np.abs(grid.scales) > 0.9 * W4.grid(W4.blocked(matrix)).scales).all()) == kept


def test_dead_channels_are_rounded_to_nearest() -> None:
    matrix, x = weights(8, 48), tokens(90, 48)
    x[:, [3, 17, 40]] = 0
    options = Compensation(ranges=Ranges.WHOLE, act_order=True)
    codes, grid = compensated(matrix, W4, gram(x), options)
    held = back(codes, grid, W4, 48)
    np.testing.assert_array_equal(held[:, [3, 17, 40]], nearest(matrix, W4)[:, [3, 17, 40]])
    assert np.isfinite(held).all()


@pytest.mark.parametrize("count", [1, 5])
def test_fewer_tokens_than_channels(count: int) -> None:
    matrix, x = weights(8, 64), tokens(count, 64)
    codes, grid = compensated(matrix, W4, gram(x), Compensation())
    held = back(codes, grid, W4, 64)
    assert np.isfinite(held).all()
    assert (output_error(matrix, held, x) <= output_error(matrix, nearest(matrix, W4), x) * 1.01).all()


def test_too_little_damping_is_raised() -> None:
    matrix, x = weights(8, 64), tokens(5, 64)
    codes, grid = compensated(matrix, W4, gram(x), Compensation(damping=1e-300))
    assert np.isfinite(back(codes, grid, W4, 64)).all()


@pytest.mark.parametrize("size", [1e-18, 1e18])
def test_the_size_of_activations_does_not_matter(size: float) -> None:
    matrix, x = weights(8, 64), tokens(100, 64)
    plain, scaled = (compensated(matrix, W4, gram(x * factor), Compensation())[0] for factor in (1, size))
    assert (plain == scaled).mean() > 0.99


@pytest.mark.parametrize("value", [0.0, 2.5, -1.0])
def test_constant_rows(value: float) -> None:
    matrix, x = np.full((1, 40), value, np.float32), tokens(60, 40)
    codes, grid = compensated(matrix, W2, gram(x), Compensation())
    np.testing.assert_allclose(back(codes, grid, W2, 40), matrix, rtol=1e-5)
    x_blocks = W2.blocked(matrix)
    np.testing.assert_allclose(mse_grid(x_blocks, W2).round_trip(x_blocks), x_blocks, rtol=1e-5)
    clamped = awq_clip(x_blocks, W2, normalised(diagonal_blocks(gram(x), 16)))
    np.testing.assert_allclose(clamped, x_blocks, rtol=1e-5)
