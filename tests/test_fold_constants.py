# SPDX-License-Identifier: Apache-2.0
"""Constant folding where one constant cannot be computed."""

from __future__ import annotations

import onnx_ir as ir

from splitfold.passes.fold_constants import fold_constants


def test_a_node_that_cannot_run_does_not_keep_the_others() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["": 17]> net (float[2] x) => (float[2] y, float[3] z)
        <float[2] a = {1, 2}, float[3] b = {1, 2, 3}>
        { c = Neg(a) d = Abs(c) y = Mul(x, d) e = Add(a, b) z = Relu(e) }"""
    )
    assert fold_constants(model) == 1  # c; then d, whose input is constant by now
    assert fold_constants(model) == 1
    assert [node.op_type for node in model.graph] == ["Mul", "Add", "Relu"]
    assert model.graph.initializers["d"].const_value is not None
    assert model.graph.initializers["d"].const_value.numpy().tolist() == [1.0, 2.0]


def test_results_larger_than_their_inputs_stay_unless_small() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> net (float[1] x) => (float y)
        <int64[1] n = {SIZE}> { c = ConstantOfShape(n) m = Mul(c, x) y = ReduceSum<keepdims=0>(m) }"""
    small, large = (ir.from_onnx_text(text.replace("SIZE", size)) for size in ("1000", "1000000"))
    assert fold_constants(small) == 1
    assert fold_constants(large) == 0
