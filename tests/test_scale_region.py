# SPDX-License-Identifier: Apache-2.0
"""Scale regions: any positive scale leaves what the model computes as it is, and what is refused says why."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from seeded import feeds_for, parse_graph

from splitfold.passes.base import Findings
from splitfold.passes.canonicalize import name_all
from splitfold.passes.channels import FREE, NotEquivariantError
from splitfold.passes.fold import fold
from splitfold.passes.layers import find_layers
from splitfold.passes.scale_region import Region, grow_region
from splitfold.passes.shapes import infer_shapes
from splitfold.runtime.session import Optimization, Session

HEADER = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>\n'


def graph(inputs: str, outputs: str, weights: str, body: str) -> str:
    return f"{HEADER}g ({inputs}) => ({outputs})\n<{weights}>\n{{{body}}}"


X = "float[batch, seq, 8] x"
Y = "float[batch, seq, 6] y"
CASES = {
    "norm": (
        graph(X, Y, "float[8] g = seeded, float[8] b = seeded, float[8,6] W = seeded",
              "n = LayerNormalization (x, g, b)\n y = MatMul (n, W)"),
        "n", 8,
    ),
    "norm with two readers": (
        graph(X, Y, "float[8] g = seeded, float[8,6] W = seeded, float[8,6] V = seeded",
              "n = LayerNormalization (x, g)\n a = MatMul (n, W)\n c = MatMul (n, V)\n y = Add (a, c)"),
        "n", 8,
    ),
    "rms norm": (
        graph(X, Y, "float[8] g = seeded, float[8,6] W = seeded",
              "n = RMSNormalization <axis = -1> (x, g)\n y = MatMul (n, W)"),
        "n", 8,
    ),
    "decomposed rms norm": (
        graph(X, Y,
              "float[8] g = seeded, float[8,6] W = seeded, float two = {2}, float e = {1e-5}, "
              "int64[1] a = {-1}",
              "p = Pow (x, two)\n m = ReduceMean (p, a)\n q = Add (m, e)\n r = Sqrt (q)\n d = Div (x, r)\n"
              " n = Mul (d, g)\n y = MatMul (n, W)"),
        "n", 8,
    ),
    "decomposed norm with a shift": (
        graph(X, Y, "float[8] g = seeded, float[8] b = seeded, float[8,6] W = seeded",
              "d = Softmax (x)\n n = Mul (d, g)\n s = Add (n, b)\n y = MatMul (s, W)"),
        "s", 8,
    ),
    "through relu": (
        graph(X, Y, "float[8,12] W = seeded, float[12] b = seeded, float[12,6] V = seeded",
              "h = MatMul (x, W)\n c = Add (h, b)\n r = Relu (c)\n y = MatMul (r, V)"),
        "r", 12,
    ),
    "gated branch": (
        graph(X, Y, "float[8,12] G = seeded, float[8,12] U = seeded, float[12,6] V = seeded",
              "g = MatMul (x, G)\n s = Sigmoid (g)\n a = Mul (g, s)\n u = MatMul (x, U)\n p = Mul (a, u)\n"
              " y = MatMul (p, V)"),
        "p", 12,
    ),
    "value to output": (
        graph("float[batch, seq, 8] x, float[batch, 2, seq, seq] p", Y,
              "float[8,8] W = seeded, float[8] b = seeded, float[8,6] V = seeded, "
              "int64[4] s = {0, -1, 2, 4}, "
              "int64[3] t = {0, -1, 8}",
              "v = MatMul (x, W)\n vb = Add (v, b)\n r = Reshape (vb, s)\n "
              "h = Transpose <perm=[0,2,1,3]> (r)\n"
              " c = MatMul (p, h)\n u = Transpose <perm=[0,2,1,3]> (c)\n f = Reshape (u, t)\n "
              "y = MatMul (f, V)"),
        "f", 8,
    ),
    "grouped queries": (
        graph("float[2, 5, 8] x, float[2, 4, 5, 5] p", "float[2, 5, 6] y",
              "float[8,6] W = seeded, float[12,6] V = seeded, int64[4] s = {2, 5, 2, 3}, "
              "int64[1] a = {2}, int64[5] e = {2, 2, 2, 5, 3}, int64[4] f4 = {2, 4, 5, 3}, "
              "int64[3] t = {2, 5, 12}",
              "v = MatMul (x, W)\n r = Reshape (v, s)\n h = Transpose <perm=[0,2,1,3]> (r)\n"
              " k = Unsqueeze (h, a)\n m = Expand (k, e)\n n = Reshape (m, f4)\n c = MatMul (p, n)\n"
              " u = Transpose <perm=[0,2,1,3]> (c)\n f = Reshape (u, t)\n y = MatMul (f, V)"),
        "f", 6,
    ),
    "fused qkv by Split": (
        graph("float[batch, seq, 8] x, float[batch, seq, seq] p",
              "float[batch, seq, 6] y, float[batch, seq, 8] q",
              "float[8,24] W = seeded, float[24] b = seeded, float[8,6] V = seeded",
              "h = MatMul (x, W)\n c = Add (h, b)\n q, k, v = Split <axis=-1, num_outputs=3> (c)\n"
              " s = MatMul (p, v)\n y0 = MatMul (s, V)\n kk = ReduceMean <keepdims=1> (k)\n "
              "y = Add (y0, kk)"),
        "s", 8,
    ),
    "fused qkv by Gather": (
        graph("float[2, 5, 8] x, float[2, 2, 5, 5] p", "float[2, 5, 6] y",
              "float[8,24] W = seeded, float[8,6] V = seeded, int64[5] s = {2, 5, 3, 2, 4}, int64 i = {2}, "
              "int64[3] t = {2, 5, 8}",
              "h = MatMul (x, W)\n r = Reshape (h, s)\n m = Transpose <perm=[2,0,3,1,4]> (r)\n"
              " v = Gather <axis=0> (m, i)\n c = MatMul (p, v)\n u = Transpose <perm=[0,2,1,3]> (c)\n"
              " f = Reshape (u, t)\n y = MatMul (f, V)"),
        "f", 8,
    ),
    "convolutions": (
        graph("float[1, 3, 8, 8] x", "float[1, 5, 6, 6] y",
              "float[4,3,3,3] W = seeded, float[4] b = seeded, float[5,4,1,1] V = seeded",
              "c = Conv (x, W, b)\n r = Relu (c)\n y = Conv (r, V)"),
        "r", 4,
    ),
    "grouped convolution reads": (
        graph("float[1, 3, 8, 8] x", "float[1, 6, 6, 6] y",
              "float[4,3,1,1] W = seeded, float[6,2,3,3] V = seeded",
              "c = Conv (x, W)\n r = Relu (c)\n y = Conv <group=2> (r, V)"),
        "r", 4,
    ),
    "convolution, pooling, Gemm": (
        graph("float[1, 3, 8, 8] x", "float[1, 6] y",
              "float[4,3,3,3] W = seeded, float[4] b = seeded, float[4,6] V = seeded",
              "c = Conv (x, W, b)\n r = Relu (c)\n p = GlobalAveragePool (r)\n f = Flatten (p)\n "
              "y = Gemm (f, V)"),
        "f", 4,
    ),
    "embedding": (
        graph("int64[batch, seq] x", Y, "float[20,8] E = seeded, float[8,6] W = seeded",
              "e = Gather (E, x)\n y = MatMul (e, W)"),
        "e", 8,
    ),
    "sum of two": (
        graph(X, Y,
              "float[8,12] W = seeded, float[8,12] U = seeded, float[12] g = seeded, float[12,6] V = seeded",
              "a = MatMul (x, W)\n b = MatMul (x, U)\n n = RMSNormalization (b, g)\n s = Add (a, n)\n"
              " y = MatMul (s, V)"),
        "s", 12,
    ),
    "concatenation": (
        graph(X, Y, "float[8,4] W = seeded, float[8,8] U = seeded, float[12,6] V = seeded",
              "a = MatMul (x, W)\n b = MatMul (x, U)\n s = Concat <axis=-1> (a, b)\n y = MatMul (s, V)"),
        "s", 12,
    ),
}  # fmt: skip

REFUSED = {
    "residual": (
        graph(X, Y,
              "float[8] g = seeded, float[8,6] W = seeded, float[6,8] V = seeded, float[8,6] U = seeded",
              "n = LayerNormalization (x, g)\n h = MatMul (n, W)\n o = MatMul (h, V)\n r = Add (n, o)\n"
              " s = Softmax (r)\n y = MatMul (s, U)"),
        "n", "Softmax",
    ),
    "gelu": (
        graph(X, Y, "float[8,12] W = seeded, float[12,6] V = seeded",
              "h = MatMul (x, W)\n a = Gelu (h)\n y = MatMul (a, V)"),
        "a", "Gelu does not pass a scale on",
    ),
    "input of the model": (
        graph(X, Y, "float[8,6] W = seeded", "y = MatMul (x, W)"), "x", "'x' is an input of the model",
    ),
    "output of the model": (
        graph(X, f"{Y}, float[batch, seq, 8] n", "float[8] g = seeded, float[8,6] W = seeded",
              "n = LayerNormalization (x, g)\n y = MatMul (n, W)"),
        "n", "'n' is an output of the model",
    ),
    "square": (
        graph(X, Y, "float[8,6] W = seeded, float[6,6] V = seeded",
              "h = MatMul (x, W)\n q = Mul (h, h)\n y = MatMul (q, V)"),
        "q", "both operands of a product",
    ),
    "tied table": (
        graph("int64[batch, seq] x", f"{Y}, float[batch, seq, 8] z",
              "float[20,8] E = seeded, float[8,6] W = seeded",
              "e = Gather (E, x)\n y = MatMul (e, W)\n z = Gather (E, x)"),
        "e", "shared",
    ),
}  # fmt: skip


def prepared(text: str) -> ir.Model:
    model = ir.from_proto(parse_graph(text))
    name_all(model, Findings())
    infer_shapes(model)
    return model


def region_of(model: ir.Model, value: str) -> Region:
    layers = {layer.node: layer for layer in find_layers(model)[0]}
    return grow_region(next(layer for layer in layers.values() if layer.input.name == value), layers)


@pytest.mark.parametrize("name", CASES)
def test_any_scale_is_exact(name: str) -> None:
    text, value, scales = CASES[name]
    model = prepared(text)
    feeds = feeds_for(model)
    before = Session(model, optimization=Optimization.OFF).run(feeds)
    region = region_of(model, value)
    assert region.scales == scales
    for marks in region.readers.values():
        assert set(marks) - {FREE} <= set(range(scales))
    fold(model, region, np.random.default_rng(3).uniform(0.2, 5, scales).astype(np.float32))
    moved = Session(model, optimization=Optimization.OFF).run(feeds, [region.values[0].name or ""])
    for output, array in before.items():
        np.testing.assert_allclose(moved[output], array, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_input_is_divided_by_the_scale(name: str) -> None:
    text, value, scales = CASES[name]
    model = prepared(text)
    feeds = feeds_for(model)
    before = Session(model, optimization=Optimization.OFF).run(feeds, [value])[value]
    region = region_of(model, value)
    reader = next(layer for layer in region.readers if layer.input.name == value)
    scale = np.random.default_rng(3).uniform(0.2, 5, scales).astype(np.float32)
    fold(model, region, scale)
    assert reader.input.name != value
    after = Session(model, optimization=Optimization.OFF).run(feeds, [reader.input.name or ""])
    spread = scale[region.readers[reader]].reshape(
        [-1] if reader.is_linear else [-1, *[1] * (before.ndim - 2)]
    )
    np.testing.assert_allclose(after[reader.input.name or ""] * spread, before, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_absorb_is_refused_with_the_operator_in_the_way(name: str) -> None:
    text, value, words = REFUSED[name]
    with pytest.raises(NotEquivariantError, match=words):
        region_of(prepared(text), value)


def test_grouped_queries_tie_the_heads_of_a_group() -> None:
    region = region_of(prepared(CASES["grouped queries"][0]), "f")
    marks = next(marks for layer, marks in region.readers.items() if layer.input.name == "f")
    heads = marks.reshape(4, 3)
    np.testing.assert_array_equal(heads[0], heads[1])
    np.testing.assert_array_equal(heads[2], heads[3])
    assert not set(heads[0]) & set(heads[2])


def test_queries_and_keys_of_a_fused_layer_keep_their_scale() -> None:
    region = region_of(prepared(CASES["fused qkv by Split"][0]), "s")
    weight = next(item for item in region.parameters if item.divides and item.node.op_type == "MatMul")
    assert (weight.marks.reshape(-1)[:16] == FREE).all()
    assert (weight.marks.reshape(-1)[16:] != FREE).all()
