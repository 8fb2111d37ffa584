# SPDX-License-Identifier: Apache-2.0
"""Attention as one operator: the numbers of the formula, and left alone where the operator has others."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from attention_graphs import HEADS, SIZE, attention_graph, numpy_softmax, outputs, seeded_feeds
from real_minilm import minilm, sentences
from seeded import parse_graph

from splitfold.passes.base import Context
from splitfold.passes.opset import default_opset
from splitfold.passes.pipeline import PassRecord, Pipeline
from splitfold.runtime.session import Optimization, Session
from splitfold.runtime.target import Target


def fused(model: ir.Model, steps: str = "fuse-attention", target: Target | None = None) -> PassRecord:
    return Pipeline.parse(steps).run(model, Context(target=target or Target.cpu()))[-1]


def operators(model: ir.Model) -> set[str]:
    return {node.op_type for node in model.graph}


@pytest.mark.parametrize("keys", [6, "tokens"])
@pytest.mark.parametrize("optimization", list(Optimization))
def test_the_operator_computes_the_formula(keys: int | str, optimization: Optimization) -> None:
    model, block = attention_graph(keys=keys)
    assert fused(model).modified
    assert default_opset(model) == 23
    assert not {"Softmax", "Transpose", "Reshape"} & operators(model)
    for seed in range(3):
        feeds = seeded_feeds(seed, empty_rows=seed == 2)
        (found,) = outputs(model, feeds, optimization=optimization)
        expected, _ = block(feeds, numpy_softmax)
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_the_node_holds_heads_and_scale_and_the_layers() -> None:
    model, block = attention_graph()
    fused(model)
    (node,) = [node for node in model.graph if node.op_type == "Attention"]
    assert node.attributes["q_num_heads"].as_int() == node.attributes["kv_num_heads"].as_int() == HEADS
    assert node.attributes["scale"].as_float() == pytest.approx(block.scale)
    assert "attention" in node.metadata_props["splitfold.layers"]


def test_a_second_run_finds_nothing() -> None:
    model, _ = attention_graph()
    fused(model)
    assert not fused(model).modified


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ("clip-softmax{alpha=3},fuse-attention", "its softmax is clipped"),
        ("fuse-attention{exclude=[attention]}", "excluded by option"),
    ],
)
def test_what_the_operator_cannot_hold_stays(steps: str, reason: str) -> None:
    model, _ = attention_graph()
    record = fused(model, steps)
    assert [why for _, why in record.skipped] == [reason]
    assert "Softmax" in operators(model) or "HardSigmoid" in operators(model)


def test_a_guard_stays_unless_it_can_go() -> None:
    model, _ = attention_graph(guard=True)
    assert "a guard against NaN" in fused(model.clone()).skipped[0][1]
    assert fused(model, "drop-nan-guards,fuse-attention").modified


@pytest.mark.parametrize("step", ["z = Mul(cj, d)", "z = QuantizeLinear(cj, k)"])
def test_what_stands_between_heads_and_their_merging_stays(step: str) -> None:
    """A scale of the next layer's input, or its quantizer, is no part of the block."""
    model, _ = attention_graph()
    before = {node.op_type for node in model.graph}
    merge = next(
        node
        for node in model.graph
        if node.name and node.op_type == "Reshape" and node.outputs[0].name == "cj"
    )
    source = merge.inputs[0]
    assert source is not None
    graph = model.graph
    if step.startswith("z = Mul"):
        held = ir.Value(name="d", const_value=ir.tensor(np.full(SIZE, 2, np.float32), name="d"))
        graph.register_initializer(held)
        put = ir.node("Mul", [source, held], name="between")
    else:
        held = ir.Value(name="k", const_value=ir.tensor(np.array(0.1, np.float32), name="k"))
        graph.register_initializer(held)
        put = ir.node("QuantizeLinear", [source, held], name="between")
    put.outputs[0].name, put.outputs[0].shape = "between_out", source.shape
    put.outputs[0].dtype = ir.DataType.FLOAT if put.op_type == "Mul" else ir.DataType.UINT8
    graph.insert_before(merge, put)
    merge.replace_input_with(0, put.outputs[0])
    record = fused(model)
    assert not record.applied
    assert before <= operators(model)


def test_a_target_of_an_older_opset_keeps_the_block() -> None:
    model, _ = attention_graph()
    record = fused(model, target=dataclasses.replace(Target.cpu(), opset=20))
    assert record.skipped[0][1] == "Attention needs opset 23: target cpu runs opset 20"
    assert default_opset(model) == 20


def test_a_bias_of_positions_and_a_seen_context_stay() -> None:
    text = """<ir_version: 10, opset_import: ["" : 23]>
net (float[b,4,8] x) => (float[b,4,8] y, float[b,2,4,4] c)
<float[2,4,4] bias = seeded, int64[4] s = {0, 0, 2, 4}, int64[3] r = {0, 0, 8}>
{
  x4 = Reshape(x, s)
  q = Transpose<perm = [0, 2, 1, 3]>(x4)
  k = Transpose<perm = [0, 2, 3, 1]>(x4)
  e = MatMul(q, k)
  t = Add(e, bias)
  p = Softmax<axis = -1>(t)
  c = MatMul(p, q)
  ct = Transpose<perm = [0, 2, 1, 3]>(c)
  y = Reshape(ct, r)
}
"""
    model = ir.from_proto(parse_graph(text))
    assert "are outputs of the model" in fused(model).skipped[0][1]
    hidden = ir.from_proto(parse_graph(text.replace(", float[b,2,4,4] c)", ")")))
    assert "depends on positions" in fused(hidden).skipped[0][1]


@pytest.mark.slow
def test_minilm_has_six_operators_and_the_same_outputs() -> None:
    model, plain = minilm().clone(), minilm().clone()
    steps = "canonicalize,drop-nan-guards,simplify-reshapes,merge-transposes,fold-multipliers,fuse-attention"
    record = fused(model, steps)
    assert len(record.applied) == 6
    for feeds in sentences():
        one, two = Session(plain).run(feeds), Session(model).run(feeds)
        for name in one:
            np.testing.assert_allclose(one[name], two[name], atol=1e-4)
