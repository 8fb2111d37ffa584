# SPDX-License-Identifier: Apache-2.0
"""Parts of weights in few bits: the paper's numbers, codes that hold them, and what these take."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from seeded import feeds_for, parse_graph

from splitfold.passes.affine import dequantize_blocks, quantize_blocks
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.effective_bits import effective_bits, entropy
from splitfold.passes.layers import find_layers
from splitfold.passes.part_codes import Grain, Grouping, PartCodes, PartGrid, code_parts
from splitfold.passes.pipeline import PassRecord, Pipeline
from splitfold.passes.split_weight import split_parts
from splitfold.runtime.feeds import Array
from splitfold.runtime.session import Session

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'
LINEAR = "net (float[b,70] x) => (float[b,9] y) <float[70,9] W = seeded> { y = MatMul(x, W) }"
LAYERS = [
    LINEAR,
    "net (float[1,4,7,7] x) => (float[1,6,5,5] y) <float[6,4,3,3] W = seeded> { y = Conv(x, W) }",
    "net (int64[b,3] x) => (float[b,3,20] y) <float[11,20] W = seeded> { y = Gather(W, x) }",
]


def graph(text: str) -> ir.Model:
    model = ir.from_proto(parse_graph(HEAD + text))
    CanonicalizePass()(model)
    return model


def run(model: ir.Model, options: str, split: str = "") -> PassRecord:
    steps = f"split-layers{{form=weight,embeddings=true{split}}},quantize-parts{{{options}}}"
    return Pipeline.parse(steps).run(model)[1]


def rounded(model: ir.Model) -> Array:
    (layer,) = find_layers(model)[0]
    return layer.weight_array()


def weights(n: int = 24, k: int = 200, seed: int = 0) -> tuple[Array, Array]:
    """Return a matrix and the part of each weight: lower, middle, upper."""
    matrix = np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)
    return matrix, ((matrix > -0.8).astype(np.uint8) + (matrix > 0.9)).astype(np.uint8)


# On grids that hold zero


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_sum_is_that_of_the_branches_bit_for_bit(bits: int, symmetric: bool) -> None:
    matrix, index = weights()
    held = [
        quantize_blocks(part, bits=bits, block=64, symmetric=symmetric) for part in split_parts(matrix, index)
    ]
    branches = np.sum([dequantize_blocks(item) for item in held], axis=0)
    found = code_parts(
        matrix, index, Grouping(Grain.BLOCK, 64), bits=bits, symmetric=symmetric, grid=PartGrid.ZERO
    )
    assert np.array_equal(found.values(), branches)


@pytest.mark.parametrize("options", ["bits=2,block=16", "bits=4,block=32,symmetric=true"])
def test_both_forms_of_the_split_compute_the_same(options: str) -> None:
    feeds = feeds_for(graph(LINEAR))
    one, many = graph(LINEAR), graph(LINEAR)
    run(one, options)
    Pipeline.parse(f"split-layers,quantize-weights{{{options},accuracy-level=1}}").run(many)
    first, second = (Session(model).run(feeds)["y"] for model in (one, many))
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-4)


def test_per_tensor_has_at_most_the_papers_levels() -> None:
    """Three parts of 2^b levels that share zero: 3 x 2^b - 2 values."""
    matrix, index = weights()
    for bits, levels in ((2, 10), (4, 46)):
        found = code_parts(
            matrix, index, Grouping(Grain.TENSOR, 0), bits=bits, symmetric=False, grid=PartGrid.ZERO
        )
        assert len(np.unique(found.values())) <= levels


# On their own intervals


def test_an_own_interval_uses_all_of_its_levels() -> None:
    """By hand: 4 levels from 5 to 8 are 5, 6, 7, 8; those of an interval with zero are 0, 2.67, 5.33, 8."""
    matrix = np.array([[5, 6, 7, 8, -1, 0, 0.5, 1]], np.float32)
    index = np.array([[1, 1, 1, 1, 0, 0, 0, 0]], np.uint8)
    whole = Grouping(Grain.CHANNEL, 0)
    own = code_parts(matrix, index, whole, bits=2, symmetric=False, grid=PartGrid.OWN)
    np.testing.assert_allclose(own.values()[0, :4], [5, 6, 7, 8], rtol=1e-3)
    zero = code_parts(matrix, index, whole, bits=2, symmetric=False, grid=PartGrid.ZERO)
    np.testing.assert_allclose(zero.values()[0, :4], [16 / 3, 16 / 3, 8, 8], rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e6])
@pytest.mark.parametrize("grain", list(Grain))
def test_no_weight_is_further_than_half_a_step(grain: Grain, scale: float) -> None:
    matrix, index = weights(seed=1)
    found = code_parts(
        matrix * np.float32(scale), index, Grouping(grain, 32), bits=3, symmetric=False, grid=PartGrid.OWN
    )
    steps = np.take_along_axis(found.scales.astype(np.float32), found.codes.astype(np.int64) // 8, 2)
    n, k = matrix.shape
    errors = np.abs(found.values() - matrix * np.float32(scale))
    allowed = 0.5 * steps.reshape(n, -1)[:, :k] + np.abs(matrix) * np.float32(scale) * 2e-3
    assert (errors <= allowed).all()


def test_a_part_of_one_value_keeps_it() -> None:
    matrix = np.array([[3, 3, -7, -7, 0.25, 0]], np.float32)
    index = np.array([[1, 1, 0, 0, 2, 3]], np.uint8)
    found = code_parts(matrix, index, Grouping(Grain.CHANNEL, 0), bits=2, symmetric=False, grid=PartGrid.OWN)
    assert np.array_equal(found.values(), matrix)


@pytest.mark.parametrize("seed", range(3))
def test_own_intervals_err_less(seed: int) -> None:
    matrix, index = weights(seed=seed)
    grids = [
        code_parts(matrix, index, Grouping(Grain.BLOCK, 128), bits=2, symmetric=False, grid=grid)
        for grid in (PartGrid.ZERO, PartGrid.OWN)
    ]
    errors = [float(np.square(grid.values() - matrix).sum()) for grid in grids]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_own_intervals_take_no_more_than_the_papers_layers(bits: int, block: int) -> None:
    matrix, index = weights(8, 512)
    found = code_parts(
        matrix, index, Grouping(Grain.BLOCK, block), bits=bits, symmetric=False, grid=PartGrid.OWN
    )
    blocks = 8 * 512 // block
    branches = 3 * (8 * 512 * bits + blocks * (32 + bits)) / 8
    assert found.scales.dtype == found.zeros.dtype == np.float16
    assert found.stored_bytes() <= branches


# As codes in the file


@pytest.mark.parametrize("text", LAYERS)
@pytest.mark.parametrize(
    "options", ["bits=2,block=16,grid=own", "bits=3,per=channel", "bits=8,per=tensor,grid=own"]
)
def test_codes_are_decoded_to_the_same_weight(text: str, options: str) -> None:
    real, coded = graph(text), graph(text)
    run(real, options)
    run(coded, f"{options},form=codes")
    feeds = feeds_for(real)
    first, second = (Session(model).run(feeds)["y"] for model in (real, coded))
    assert np.array_equal(first, second)


def test_the_runtime_folds_the_decoding(tmp_path: object) -> None:
    model = graph(LINEAR)
    run(model, "bits=2,grid=own,form=codes")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = f"{tmp_path}/optimized.onnx"
    options.log_severity_level = 3
    onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    assert [node.op_type for node in ir.load(options.optimized_model_filepath).graph] == ["MatMul"]


def test_the_bytes_told_are_those_of_the_file() -> None:
    model = graph(LINEAR)
    record = run(model, "bits=2,block=32,form=codes")
    held = {name: value.const_value for name, value in model.graph.initializers.items()}
    stored = sum(
        tensor.nbytes
        for name, tensor in held.items()
        if tensor is not None and name.endswith(("codes", "scales", "zeros"))
    )
    assert record.notes[0].startswith(f"{8 * stored / 630:.2f} bits a weight as stored")
    (found,) = effective_bits(model)
    assert found.weights == 630
    assert found.stored == pytest.approx(8 * (record.bytes_after) / 630)


def test_a_model_that_cannot_be_raised_keeps_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitfold.passes.quantize_parts.raise_opset", lambda model, opset: "it may not be")
    record = run(graph(LINEAR), "form=codes")
    assert not record.modified
    assert record.skipped[0][1] == "codes of 4 bits need opset 21: it may not be"


def test_half_precision_is_left_alone() -> None:
    model = graph("net (float16[b,9] x) => (float16[b,5] y) <float16[9,5] W = seeded> { y = MatMul(x, W) }")
    assert run(model, "bits=2").skipped[0][1] == "the weight is float16, not float32"


# What codes are worth


def test_entropy_by_hand() -> None:
    assert entropy(np.array([0, 0, 1, 2])) == pytest.approx(1.5)
    assert entropy(np.zeros(5, np.int64)) == 0


def test_padding_has_no_part_in_the_codes() -> None:
    matrix, index = weights(2, 20)
    found = code_parts(matrix, index, Grouping(Grain.BLOCK, 16), bits=2, symmetric=False, grid=PartGrid.OWN)
    assert found.codes.shape == (2, 2, 16)
    assert found.own_codes().shape == (2, 20)
    assert isinstance(found, PartCodes)
    assert found.code_bits == 4
    assert found.stored_bytes() == 2 * 2 * 16 // 2 + 2 * 2 * 3 * (2 + 2)


@pytest.mark.parametrize(
    ("steps", "stored", "levels"),
    [
        ("quantize-weights{bits=4,block=16}", 4 + 32 / 16 + 8 / 32, 16),
        ("quantize-weights{bits=4,block=16,form=qdq}", 4 + 32 / 16 + 4 / 16, 16),
        ("quantize-weights{bits=2,block=16,symmetric=true}", 2 + 32 / 16, 4),
        ("quantize-dynamic", 8 + (32 + 8) / 32, 32),
        ("split-layers,quantize-weights{bits=2,block=32}", 3 * (2 + 32 / 32 + 8 / 32), 10),
        ("split-activations{parts=2},quantize-weights{bits=4,block=16}", 4 + 32 / 16 + 8 / 16, 16),
    ],
)
def test_effective_bits_by_hand(steps: str, stored: float, levels: int) -> None:
    model = graph("net (float[4,32] x) => (float[4,40] y) <float[32,40] W = seeded> { y = MatMul(x, W) }")
    Pipeline.parse(steps).run(model)
    (found,) = effective_bits(model)
    assert found.weights == 32 * 40
    assert found.stored == pytest.approx(stored)
    assert 1 < found.levels <= levels
    assert 0 < found.entropy <= stored


def test_effective_bits_of_static_int8_and_tables() -> None:
    model = graph(
        "net (int64[b,3] i) => (float[b,3,16] t, float[b,3,16] u) <float[11,16] T = seeded, "
        "float[9,32] U = seeded, int64[1] s = {0}, int64[1] e = {16}, int64[1] a = {2}> "
        "{ t = Gather(T, i) v = Gather(U, i) u = Slice(v, s, e, a) }"
    )
    Pipeline.parse("quantize-embeddings{min-bytes=0}").run(model)
    found = effective_bits(model)
    assert [item.weights for item in found] == [11 * 16, 9 * 32]
    assert [item.stored for item in found] == pytest.approx([8 + 32 / 16, 8 + 32 / 32])
