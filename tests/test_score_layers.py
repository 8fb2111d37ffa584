# SPDX-License-Identifier: Apache-2.0
"""Which layers make queries and keys, and that the clip search leaves them alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from seeded import parse_graph

from splitfold.passes.base import Context
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.identity import display_layer
from splitfold.passes.pipeline import PassRecord, Pipeline
from splitfold.passes.score_layers import score_makers
from splitfold.runtime.calibration import Calibration

HEAD = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>\n'


def graph(text: str) -> ir.Model:
    model = ir.from_proto(parse_graph(HEAD + text))
    CanonicalizePass()(model)
    return model


def makers(text: str) -> set[str]:
    return {display_layer(node) for node in score_makers(graph(text))}


ATTENTION = """
net (float[b,n,32] x) => (float[b,n,32] y, float[b,n,4] classes)
<float[32,32] Q = seeded, float[32,32] K = seeded, float[32,32] V = seeded, float[32,32] O = seeded,
 float[32] bias = seeded, float[32,4] C = seeded, int64[4] heads = {0, 0, 4, 8}, int64[3] joined = {0, 0, 32},
 float eighth = {0.125}>
{
  [query] q0 = MatMul(x, Q)
  [query] q1 = Add(q0, bias)
  [heads] q2 = Reshape(q1, heads)
  [heads] q3 = Transpose<perm = [0, 2, 1, 3]>(q2)
  [key] k0 = MatMul(x, K)
  [heads] k1 = Reshape(k0, heads)
  [heads] k2 = Transpose<perm = [0, 2, 3, 1]>(k1)
  [value] v0 = MatMul(x, V)
  [heads] v1 = Reshape(v0, heads)
  [heads] v2 = Transpose<perm = [0, 2, 1, 3]>(v1)
  [scores] s = MatMul(q3, k2)
  [scores] t = Mul(s, eighth)
  [scores] p = Softmax(t)
  [mix] m = MatMul(p, v2)
  [mix] m1 = Transpose<perm = [0, 2, 1, 3]>(m)
  [mix] m2 = Reshape(m1, joined)
  [out] y = MatMul(m2, O)
  [head] l = MatMul(y, C)
  [head] classes = Softmax(l)
}
"""


def test_queries_and_keys_are_found_and_nothing_else() -> None:
    assert makers(ATTENTION) == {"query", "key"}


def test_fused_attention_operators() -> None:
    text = """
    net (float[b,n,32] x) => (float[b,n,32] y)
    <float[32,32] Q = seeded, float[32,32] K = seeded, float[32,32] V = seeded>
    {
      [query] q = MatMul(x, Q)
      [key] k = MatMul(x, K)
      [value] v = MatMul(x, V)
      [attention] y = com.microsoft.MultiHeadAttention<num_heads = 4>(q, k, v)
    }
    """
    model = ir.from_proto(
        parse_graph('<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>' + text)
    )
    CanonicalizePass()(model)
    assert {display_layer(node) for node in score_makers(model)} == {"query", "key"}


def test_fused_projection_counts_as_a_whole() -> None:
    text = """
    net (float[b,n,16] x) => (float[b,n,16] y)
    <float[16,48] W = seeded, int64[3] sizes = {16, 16, 16}>
    {
      [qkv] h = MatMul(x, W)
      [qkv] q, k, v = Split<axis = 2>(h, sizes)
      [turn] t = Transpose<perm = [0, 2, 1]>(k)
      [scores] s = MatMul(q, t)
      [scores] p = Softmax(s)
      [mix] y = MatMul(p, v)
    }
    """
    assert makers(text) == {"qkv"}


def test_a_classifier_makes_no_scores() -> None:
    text = "net (float[b,32] x) => (float[b,8] y) <float[32,8] W = seeded>"
    assert makers(text + " { [head] h = MatMul(x, W) [soft] y = Softmax(h) }") == set()


def quantized(model: ir.Model, options: str, feeds: dict[str, np.ndarray]) -> PassRecord:
    context = Context(calibration=Calibration.of([feeds]))
    return Pipeline.parse(f"quantize-weights{{{options}}}").run(model, context)[0]


def test_awq_leaves_queries_and_keys_unclipped() -> None:
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 40, 32)).astype(np.float32)}
    clipped, rounded = graph(ATTENTION), graph(ATTENTION)
    done = dict(quantized(clipped, "method=awq,bits=2", feeds).applied)
    quantized(rounded, "bits=2", feeds)
    for name, layer in (("Q", "query"), ("K", "key"), ("V", "value"), ("O", "out")):
        codes = [model.graph.initializers[f"{name}_int2"].const_value for model in (clipped, rounded)]
        assert codes[0] is not None
        assert codes[1] is not None
        same = np.array_equal(codes[0].numpy(), codes[1].numpy())
        assert same == (layer in ("query", "key"))
        assert ("unclipped" in done[layer]) == same
