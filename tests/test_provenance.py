# SPDX-License-Identifier: Apache-2.0
"""Values keep what they stand for through every pass, and parts of a model compute what the whole does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from seeded import parse_graph
from small import mlp, samples

from splitfold.compiler import compile
from splitfold.passes.base import Context, Findings
from splitfold.passes.canonicalize import name_all
from splitfold.passes.pipeline import Pipeline
from splitfold.passes.provenance import anchors, stands_for
from splitfold.passes.submodel import node_model, submodel, type_inputs
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.model_file import read_model
from splitfold.runtime.session import Optimization, Session

NORM = """<ir_version: 9, opset_import: ["" : 20]>
norm (float[batch, 5, 8] x) => (float[batch, 5, 8] y)
<float[8] gamma = {1, 2, 3, 4, 5, 6, 7, 80}, float[8] beta = {1, 1, 1, 1, 1, 1, 1, 1}, float[8, 8] W = seeded>
{ n = LayerNormalization (x, gamma, beta)
  y = MatMul (n, W) }"""

CONV = """<ir_version: 9, opset_import: ["" : 20]>
conv (float[batch, 2, 6, 6] x) => (float[batch, 2, 4, 4] y)
<float[2, 2, 3, 3] W = seeded, float[2] g = {2, 3}, float[2] b = {1, 1},
 float[2] m = {0.5, 0.5}, float[2] v = {1, 4}>
{ c = Conv (x, W)
  n = BatchNormalization (c, g, b, m, v)
  y = Relu (n) }"""


def parsed(text: str) -> ir.Model:
    return ir.from_proto(parse_graph(text))


def test_quantized_layers_stand_for_the_float_ones(tmp_path: Path) -> None:
    reference = ir.from_proto(mlp())
    name_all(reference, Findings())
    made = compile(mlp(), pipeline="quantize-activations", calibration={"x": samples()})
    found = anchors(reference, made.model)
    assert list(found) == ["h", "hb", "r", "y"]
    assert found["h"] != "h"
    again = read_model(made.save_model(tmp_path / "made.onnx"))
    assert anchors(reference, again) == found


def test_a_fused_bias_leaves_the_sum_alone_comparable() -> None:
    reference = ir.from_proto(mlp())
    name_all(reference, Findings())
    made = compile(mlp(), pipeline="quantize-activations{form=integer}", calibration={"x": samples()})
    assert list(anchors(reference, made.model)) == ["hb", "r", "y"]


def test_a_folded_norm_takes_the_place_of_the_norm_not_of_the_convolution() -> None:
    model = parsed(CONV)
    reference = model.clone()
    Pipeline.parse("canonicalize").run(model)
    conv = next(node for node in model.graph if node.op_type == "Conv")
    assert stands_for(conv.outputs[0]) == "n"
    assert "c" not in anchors(reference, model)


def test_a_rescaled_value_stands_for_nothing() -> None:
    model = parsed(NORM)
    reference = model.clone()
    data = Calibration.of({"x": np.random.default_rng(1).standard_normal((4, 5, 8)).astype(np.float32)})
    Pipeline.parse("canonicalize,fold-scales{min-gain=-100}").run(model, Context(calibration=data))
    norm = next(node for node in model.graph if node.op_type == "LayerNormalization")
    assert stands_for(norm.outputs[0]) is None
    assert list(anchors(reference, model)) == ["y"]


@pytest.mark.parametrize("given", [(), ("h",), ("hb",)])
def test_submodel_computes_what_the_whole_does(given: tuple[str, ...]) -> None:
    model = ir.from_proto(mlp())
    whole = Session(model, optimization=Optimization.OFF).run({"x": samples()}, ["h", "hb", "r"])
    part = submodel(model, ["r", "y"], given)
    inputs = [value.name for value in part.graph.inputs]
    assert inputs == (list(given) or ["x"])
    feeds = {name: whole.get(name, samples()) for name in inputs}
    type_inputs(part, feeds)
    results = Session(part, optimization=Optimization.OFF).run(feeds)
    assert list(results) == ["r", "y"]
    for name, array in results.items():
        np.testing.assert_array_equal(array, whole[name])
    assert len(list(model.graph)) == 4


def test_node_model_takes_any_nodes() -> None:
    model = ir.from_proto(mlp())
    nodes = list(model.graph)
    part = node_model(model, {nodes[0], nodes[3]})
    assert [value.name for value in part.graph.inputs] == ["x", "r"]
    assert [value.name for value in part.graph.outputs] == ["h", "y"]
    whole = Session(model, optimization=Optimization.OFF).run({"x": samples()}, ["h", "r"])
    feeds = {"x": samples(), "r": whole["r"]}
    type_inputs(part, feeds)
    results = Session(part, optimization=Optimization.OFF).run(feeds)
    for name, array in results.items():
        np.testing.assert_array_equal(array, whole[name])


def test_node_model_reads_what_a_subgraph_reads() -> None:
    text = """<ir_version: 9, opset_import: ["" : 20]>
    branch (float[4] x, bool c) => (float[4] y)
    { a = Relu (x)
      b = Neg (x)
      y = If (c) <then_branch = t () => (float[4] p) { p = Identity (a) },
                  else_branch = e () => (float[4] q) { q = Identity (b) }> }"""
    model = ir.from_onnx_text(text)
    branch = next(node for node in model.graph if node.op_type == "If")
    part = node_model(model, {branch})
    assert {value.name for value in part.graph.inputs} == {"a", "b", "c"}
    feeds = {"a": np.ones(4, np.float32), "b": np.zeros(4, np.float32), "c": np.array(False)}
    type_inputs(part, feeds)
    np.testing.assert_array_equal(Session(part).run(feeds)["y"], feeds["b"])
