# SPDX-License-Identifier: Apache-2.0
"""Dual-grained weights: the grids against the literal double loop, and the int8 layer bit for bit."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from seeded import parse_graph

from splitfold.compiler.realisation import read_realisation
from splitfold.passes.base import Context
from splitfold.passes.block_grid import BlockLayout
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.dgq import COARSE_RATIOS, FINE_RATIOS, DualGrained, dual_grained
from splitfold.passes.pipeline import PassRecord, Pipeline
from splitfold.passes.weight_forms import paper_bytes, stored_bytes
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.session import Optimization, Session, optimized_graph
from splitfold.runtime.target import Target

W4 = BlockLayout(4, 16, symmetric=False, levels=16)
LAYOUTS = [W4, BlockLayout(4, 16, False, 8), BlockLayout(2, 32, False, 4)]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["4 bits", "3 bits", "2 bits"])


def weights(n: int, k: int, seed: int = 0) -> Array:
    """Rows of different size, blocks of different size inside a row."""
    rng = np.random.default_rng(seed)
    sizes = np.repeat(np.exp(rng.standard_normal((n, -(-k // 8)))), 8, axis=1)[:, :k]
    return np.asarray(rng.standard_normal((n, k)) * sizes, np.float32)


def tokens(count: int, k: int) -> Array:
    rng = np.random.default_rng(1)
    return np.asarray(rng.standard_normal((count, k)) @ rng.standard_normal((k, k)) / np.sqrt(k))


def gram(x: Array) -> Array:
    return np.asarray(x.T @ x, np.float64)


# The grids


def test_the_ratios_are_those_of_the_paper() -> None:
    assert (len(FINE_RATIOS), FINE_RATIOS[0], FINE_RATIOS[-1]) == (
        20,
        pytest.approx(1.009),
        pytest.approx(0.8),
    )
    assert (len(COARSE_RATIOS), COARSE_RATIOS[-1]) == (80, pytest.approx(0.2))
    assert COARSE_RATIOS[0] == pytest.approx(1.00975)


def literal(matrix: Array, x: Array, layout: BlockLayout, levels: int) -> tuple[Array, float]:
    """Both phases as they are written down, for one row: (weights as they come back, least output error)."""
    top = layout.levels - 1
    w = matrix.astype(np.float64)
    starts = range(0, len(w), layout.block)
    fine, zeros = [], []
    for start in starts:
        part, seen = w[start : start + layout.block], x[:, start : start + layout.block]
        low, high = min(part.min(), 0.0), max(part.max(), 0.0)
        best, kept = np.inf, None
        for i in range(20):
            r = 1.02 - 0.22 * (i + 1) / 20
            scale = (high - low) * r / top
            zero = np.clip(np.rint(-low * r / scale), 0, top)
            q = np.clip(np.rint(np.clip(part, r * low, r * high) / scale) + zero, 0, top)
            loss = np.square(seen @ part - seen @ ((q - zero) * scale)).sum()
            if loss < best:
                best, kept = loss, (scale, zero)
        assert kept is not None
        fine.append(kept[0])
        zeros.append(kept[1])
    best, result = np.inf, w
    for i in range(80):
        r = 1.02 - 0.82 * (i + 1) / 80
        s8 = r * np.abs(w).max() / levels
        held = np.empty_like(w)
        for start, scale, zero in zip(starts, fine, zeros, strict=True):
            part = w[start : start + layout.block]
            step = np.clip(np.rint(scale / s8), 1, levels)
            margin = levels // step
            q = np.rint(part / (step * s8)) + zero
            q = np.clip(q, max(0, zero - margin), min(top, zero + margin))
            held[start : start + layout.block] = (q - zero) * step * s8
        loss = np.square(x @ w - x @ held).sum()
        if loss < best:
            best, result = loss, held
    return result, best


@layouts
@pytest.mark.parametrize("levels", [127, 63])
def test_the_search_is_the_literal_double_loop(layout: BlockLayout, levels: int) -> None:
    matrix, x = weights(8, 72), tokens(100, 72)
    dual = dual_grained(matrix, layout, gram(x), int8_levels=levels)
    held = dual.integers() * dual.scales[:, None]
    for row in range(8):
        expected, loss = literal(matrix[row], x, layout, levels)
        assert np.square(x @ (held[row] - matrix[row])).sum() == pytest.approx(loss, rel=1e-3)
        np.testing.assert_allclose(held[row], expected, rtol=1e-4, atol=1e-6)


@layouts
@pytest.mark.parametrize("levels", [127, 63])
def test_integers_stay_inside_int8(layout: BlockLayout, levels: int) -> None:
    matrix = weights(40, 100, seed=3)
    matrix[:20] = np.abs(matrix[:20])  # ranges that do not hold zero
    matrix[5, 16:32] *= 1e4  # one block that dwarfs its row
    dual = dual_grained(matrix, layout, gram(tokens(50, 100)), int8_levels=levels)
    whole = (dual.codes.astype(int) - dual.zero_points[..., None]) * dual.steps[..., None].astype(int)
    assert np.abs(whole).max() <= levels
    np.testing.assert_array_equal(dual.integers(), whole.reshape(40, -1)[:, :100])
    assert dual.steps.min() >= 1
    assert dual.codes.max() < layout.levels
    assert dual.zero_points.max() < layout.levels
    padding = dual.codes.reshape(40, -1)[:, 100:]
    np.testing.assert_array_equal(padding, np.repeat(dual.zero_points, layout.block, 1)[:, 100:])


def test_the_guard_is_needed() -> None:
    """Without it (q - z) * S1 would leave int8: some code lies on a bound that only the guard sets."""
    dual = dual_grained(weights(40, 96), W4, gram(tokens(50, 96)))
    margin = 127 // dual.steps.astype(int)
    low, high = dual.zero_points - margin, dual.zero_points + margin
    at_guard = (dual.codes == low[..., None]) & (low > 0)[..., None]
    at_guard |= (dual.codes == high[..., None]) & (high < 15)[..., None]
    assert at_guard.any()


def test_block_wise_is_the_same_weights() -> None:
    dual = dual_grained(weights(6, 40), W4, np.eye(40))
    blocks = dual.block_wise()
    np.testing.assert_array_equal(blocks.codes, dual.codes)
    np.testing.assert_allclose(blocks.scales, dual.steps * dual.scales[:, None], rtol=1e-7)


@pytest.mark.parametrize("value", [0.0, 3.0, -0.25])
def test_constant_rows(value: float) -> None:
    matrix = np.full((1, 40), value, np.float32)
    dual = dual_grained(matrix, W4, np.eye(40))
    # a channel's only value is missed by up to 2 %: S1 follows the block's range, not the value
    np.testing.assert_allclose(dual.integers() * dual.scales[:, None], matrix, rtol=0.02)
    assert np.isfinite(dual.scales).all()


def test_an_empty_block_in_a_row() -> None:
    matrix = weights(3, 48)
    matrix[:, 16:32] = 0
    dual = dual_grained(matrix, W4, np.eye(48))
    assert not dual.integers()[:, 16:32].any()


def test_bytes_are_counted_as_held() -> None:
    dual = dual_grained(weights(8, 72), BlockLayout(4, 32, False, 16), np.eye(72))
    # 3 blocks of 32: 96 codes, 3 zero points and 3 steps a row; int8 zero points of the kernel
    assert stored_bytes(dual) == 8 * 96 // 2 + 8 * 3 // 2 + 8 * 3 + 8 * 4 + 8
    assert stored_bytes(dual, expanded=True) == 8 * 72 + 8 * 4 + 8
    assert stored_bytes(dual.block_wise()) == 8 * 96 // 2 + 8 * 3 * 4 + 8 * 2
    assert paper_bytes(dual) == 8 * 72 / 2 + 8 * 3 / 2 + 8 * 3 + 8 * 2


# The int8 layer

TEXT = """<ir_version: 10, opset_import: ["" : 20]>
net (float[batch,tokens,40] x) => (float[batch,tokens,24] y, float[batch,tokens,6] z)
<float[40,24] A = seeded, float[24] b = seeded, float[40,6] C = seeded>
{
  [first] p = MatMul(x, A)
  [first] y = Add(p, b)
  [second] z = MatMul(x, C)
}
"""
FORMS = ["int8-static", "int8-dynamic", "int8-token"]
EXPANDS = ["load", "offline"]


def data(count: int = 3, seed: int = 5) -> list[Feeds]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((2, 9, 40)).astype(np.float32)} for _ in range(count)]


def compiled(
    form: str, expand: str, *, bits: int = 4, target: Target | None = None
) -> tuple[ir.Model, PassRecord]:
    model = ir.from_proto(parse_graph(TEXT))
    text = f"canonicalize,quantize-weights{{method=dgq,block=16,bits={bits},form={form},expand={expand}}}"
    context = Context(target or Target.cpu(), Calibration.of(data()))
    return model, Pipeline.parse(text).run(model, context)[-1]


def tensor(model: ir.Model, name: str) -> Array:
    value = model.graph.initializers[name].const_value
    assert value is not None
    return np.asarray(value.numpy())


def integer_weight(model: ir.Model, name: str) -> Array:
    """Return (q - z) * S1, [K, N], from what the file holds."""
    if f"{name}_int8" in model.graph.initializers:
        return tensor(model, f"{name}_int8").astype(np.int32)
    codes, zeros = (
        tensor(model, f"{name}_{part}").astype(np.int32) for part in ("int4", "block_zero_points")
    )
    whole = (codes - zeros) * tensor(model, f"{name}_steps").astype(np.int32)
    return whole.reshape(-1, whole.shape[-1])[:40]


def integer_input(model: ir.Model, form: str, x: Array) -> tuple[Array, Array]:
    """Return the activations' codes less their zero point (int32), and what one is worth."""
    x = x.reshape(-1, 40)
    if form == "int8-token":
        scales = np.maximum(np.abs(x).max(1, keepdims=True), np.float32(1e-30)) * np.float32(1 / 127)
        return np.rint(x / scales).astype(np.int32), scales
    if form == "int8-static":
        scale, zero = tensor(model, "x_scale"), int(tensor(model, "x_zero_point"))
    else:
        low, high = np.minimum(x.min(), np.float32(0)), np.maximum(x.max(), np.float32(0))
        scale = (high - low) / np.float32(255)
        zero = int(np.clip(np.rint(-low / scale), 0, 255))
    codes = np.clip(np.rint(x / scale) + zero, 0, 255)
    return codes.astype(np.int32) - zero, np.asarray(scale)


@pytest.mark.parametrize(("form", "expand"), list(itertools.product(FORMS, EXPANDS)))
def test_forms_hold_what_the_search_found(form: str, expand: str) -> None:
    plain = ir.from_proto(parse_graph(TEXT))
    rows = np.concatenate([feeds["x"].reshape(-1, 40) for feeds in data()])
    model, _ = compiled(form, expand)
    for name in ("A", "C"):
        dual = dual_grained(np.ascontiguousarray(tensor(plain, name).T), W4, gram(rows.astype(np.float64)))
        # sums in another order may tip a near tie between two ratios
        assert (integer_weight(model, name) == dual.integers().T).mean() > 0.9
        assert (tensor(model, f"{name}_scale") == dual.scales).mean() > 0.9


@pytest.mark.parametrize("optimization", Optimization)
@pytest.mark.parametrize(("form", "expand"), list(itertools.product(FORMS, EXPANDS)))
def test_the_integer_product_bit_for_bit(form: str, expand: str, optimization: Optimization) -> None:
    model, record = compiled(form, expand)
    assert len(record.applied) == 2
    x = data(1, seed=9)[0]["x"]
    found = Session(model, threads=1, optimization=optimization).run({"x": x})
    codes, worth = integer_input(model, form, x)
    for name, output, bias in (("A", "y", "b"), ("C", "z", None)):
        sums = codes @ integer_weight(model, name)
        assert sums.dtype == np.int32
        step = tensor(model, f"{name}_scale")
        # floats in the order in which the kernel multiplies
        real = (
            (sums.astype(np.float32) * step) * worth
            if form == "int8-token"
            else sums.astype(np.float32) * (worth * step)
        )
        real = real if bias is None else real + tensor(model, bias)
        actual = found[output].reshape(real.shape)
        # the integers decide; one unit in the last place is left to the order of bias and scale
        np.testing.assert_allclose(actual, real, rtol=3e-7, atol=1e-6)
        if bias is None:
            exact = np.rint(actual.astype(np.float64) / (worth.astype(np.float64) * step.astype(np.float64)))
            np.testing.assert_array_equal(exact.astype(np.int32), sums)


@pytest.mark.parametrize("form", FORMS)
def test_expanded_at_load_or_before_is_the_same(form: str) -> None:
    outputs = []
    for expand in EXPANDS:
        model, _ = compiled(form, expand)
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        outputs.append(Session(model, threads=1).run(data(1, seed=9)[0]))
    for name in outputs[0]:
        np.testing.assert_array_equal(outputs[0][name], outputs[1][name])


@pytest.mark.parametrize("form", FORMS)
def test_the_runtime_folds_the_expansion(form: str) -> None:
    model, record = compiled(form, "load")
    graph = optimized_graph(model, Target.cpu()).graph
    kinds = [node.op_type for node in graph]
    assert not {"Cast", "Sub", "Reshape", "Slice"} & set(kinds), kinds
    assert any(
        value.dtype is ir.DataType.INT8 and value.shape == (40, 24) for value in graph.initializers.values()
    )
    found = read_realisation(model, [record], Target.cpu())
    assert [item.layer for item in found] == ["first", "second"]
    assert all(item.realised for item in found), found


@pytest.mark.parametrize("form", FORMS)
def test_codes_on_disk_take_half(form: str) -> None:
    notes = {expand: compiled(form, expand)[1].notes[-1] for expand in EXPANDS}
    bits = {expand: float(note.split(" ")[0]) for expand, note in notes.items()}
    # 40 rows take 3 blocks of 16
    assert bits["load"] == pytest.approx(8 * (48 / 2 + 3 / 2 + 3 + 4 + 1) / 40, abs=0.01)
    assert bits["offline"] == pytest.approx(8 * (40 + 4 + 1) / 40, abs=0.01)
    assert "5.30 as DGQ counts" in notes["load"]


def test_fewer_levels_where_kernels_saturate() -> None:
    import dataclasses

    target = dataclasses.replace(Target.cpu(), weight_levels=63)
    model, _ = compiled("int8-dynamic", "offline", target=target)
    assert 40 <= np.abs(tensor(model, "A_int8").astype(int)).max() <= 63


@pytest.mark.parametrize("bits", [2, 3])
def test_fewer_bits(bits: int) -> None:
    model, record = compiled("int8-token", "load", bits=bits)
    assert tensor(model, "A_int4").astype(int).max() < 2**bits
    assert ("3-bit codes are stored in 4 bits" in record.notes[-1]) == (bits == 3)
    assert Session(model).run(data(1)[0])


def test_a_token_of_zeros() -> None:
    model, _ = compiled("int8-token", "load")
    x = data(1)[0]["x"].copy()
    x[1, 4] = 0
    found = Session(model, threads=1).run({"x": x})
    assert not found["z"][1, 4].any()
    np.testing.assert_array_equal(found["y"][1, 4], tensor(model, "b"))


@pytest.mark.parametrize("opset", [13, 18])
def test_older_opsets(opset: int) -> None:
    model = ir.from_proto(parse_graph(TEXT.replace('"" : 20', f'"" : {opset}')))
    CanonicalizePass()(model)
    before = Session(model).run(data(1)[0])
    text = "quantize-weights{method=dgq,block=16,form=int8-token,expand=offline}"
    Pipeline.parse(text).run(model, Context(calibration=Calibration.of(data())))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    after = Session(model).run(data(1)[0])
    noise = np.square(after["y"] - before["y"]).sum() / np.square(before["y"]).sum()
    assert noise < 0.02


def test_layers_of_one_input_share_its_codes() -> None:
    for form, kind in (("int8-token", "QuantizeLinear"), ("int8-dynamic", "DynamicQuantizeLinear")):
        model, _ = compiled(form, "load")
        assert [node.op_type for node in model.graph].count(kind) == 1


def test_dual_grained_is_a_value() -> None:
    dual = dual_grained(weights(2, 16), W4, np.eye(16))
    assert isinstance(dual, DualGrained)
    assert dual.columns == 16
