# SPDX-License-Identifier: Apache-2.0
"""The difference of two models: every kind of change is found, named and measured, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from diffing import compiled, difference, only_layer, only_tensor, parsed_model
from onnx import helper, numpy_helper
from small import WIDTH, initializer, mlp, model_of, saved

from splitfold.compiler.debug.diff.graph_diff import diff
from splitfold.compiler.debug.diff.types import Aspect, Detail, Kind, SlotChange
from splitfold.passes.pipeline import Pipeline
from splitfold.runtime.model_file import read_model


def test_a_model_and_its_copies_are_equal(tmp_path: Path) -> None:
    model = ir.from_proto(mlp())
    file = saved(mlp(), tmp_path / "m.onnx")
    renamed = ir.from_proto(mlp())
    for number, node in enumerate(renamed.graph):
        node.name = f"other{number}"
    renamed.graph.initializers["w1"].name = "kernel"
    for other in (model, model.clone(), read_model(file), renamed, compiled(mlp(), "canonicalize")):
        for found in (diff(model, other), diff(other, model)):
            assert found.equal, found.layers
            assert found.summary.weight_bytes == (8192 + 256 + 2048,) * 2
    assert diff(model, renamed).summary.tensors_renamed == 1
    assert not any("splitfold" in key for node in model.graph for key in node.metadata_props)  # not changed


def test_another_order_of_a_sum_is_no_difference() -> None:
    one = "g (float[4] x) => (float[4] y) { a = Relu (x)  b = Neg (x)  y = %s }"
    assert difference(one % "Add (a, b)", one % "Add (b, a)").equal
    found = only_layer(difference(one % "Sub (a, b)", one % "Sub (b, a)")).nodes[0]
    assert found.kind is Kind.CHANGED
    assert found.details == (Detail(Aspect.INPUT, "0", "a", "b"), Detail(Aspect.INPUT, "1", "b", "a"))


# --- nodes ---


def test_attributes_and_their_defaults() -> None:
    text = "g (float[4, 6] x) => (float[4, 6] y) { y = %s }"
    assert difference(text % "Softmax (x)", text % "Softmax <axis = -1> (x)").equal
    (change,) = only_layer(difference(text % "Softmax (x)", text % "Softmax <axis = 0> (x)")).nodes
    assert change.details == (Detail(Aspect.ATTRIBUTE, "axis", "-1", "0"),)
    near = difference(text % "Elu <alpha = 1.5> (x)", text % "Elu <alpha = 1.5000001> (x)")
    assert only_layer(near).nodes[0].details[0].before != only_layer(near).nodes[0].details[0].after
    shaped = (
        "g (float[4] x) => (float[4] y) { c = Constant <value = float[4] {1, 2, 3, %s}> ()  y = Mul (x, c) }"
    )
    assert (
        only_tensor(difference(shaped % "4", shaped % "5")).moved is not None
    )  # a Constant node is an initializer


def test_added_removed_replaced() -> None:
    text = "g (float[4] x) => (float[4] y) {{ h = Relu (x)  {0}  y = {1} }}"
    plain = text.format("", "Exp (h)")
    more = text.format("i = Neg (h)", "Exp (i)")
    (added,) = only_layer(difference(plain, more)).nodes
    assert (added.kind, [node.operator for node in added.after]) == (Kind.ADDED, ["Neg"])
    (removed,) = only_layer(difference(more, plain)).nodes
    assert (removed.kind, [node.outputs for node in removed.before]) == (Kind.REMOVED, [("i",)])
    (replaced,) = only_layer(difference(plain, text.format("", "Tanh (h)"))).nodes
    assert (replaced.before[0].operator, replaced.after[0].operator) == ("Exp", "Tanh")
    summary = difference(plain, more).summary
    assert (summary.nodes, summary.nodes_added, summary.nodes_removed, summary.nodes_changed) == (
        (2, 3),
        1,
        0,
        0,
    )


def test_an_input_from_elsewhere() -> None:
    text = """g (float[4] x, float[4] z) => (float[4] y, float[4] c) {
      a = Relu (x)  b = Exp (z)  c = Neg (a)  y = Add (%s, b) }"""
    for other in "axz":
        (change,) = only_layer(difference(text % "c", text % other)).nodes
        assert change.details == (Detail(Aspect.INPUT, "0", "c", other),)


def test_a_constant_that_was_computed() -> None:
    text = "g (float[4] x) => (float[4] y) <float[4] w = seeded> { %s y = Add (x, v) }"
    before = parsed_model(text % "v = Exp (w)")
    after = before.clone()
    Pipeline.parse("canonicalize").run(after)
    (change,) = [change for layer in diff(before, after).layers for change in layer.nodes]
    assert change.kind is Kind.REMOVED
    assert change.folded


def test_types() -> None:
    text = "g (float[batch, 4] x) => (float[%s] y) { s = Shape (x)  z = Reshape (x, s)  y = Exp (z) }"
    found = difference(text % "batch, 4", text % "8, 4")
    assert found.slots == (SlotChange(found.slots[0].slot, "y", "float[batch,4]", "float[8,4]"),)
    first, second = (ir.from_proto(mlp()) for _ in range(2))
    value = next(value for node in second.graph for value in node.outputs if value.name == "h")
    other = next(value for node in first.graph for value in node.outputs if value.name == "h")
    value.type, other.type = ir.TensorType(ir.DataType.FLOAT16), ir.TensorType(ir.DataType.FLOAT)
    assert only_layer(diff(first, second)).nodes[0].details[0].aspect is Aspect.OUTPUT_TYPE
    other.type = None  # not known is no difference
    assert diff(first, second).equal


def test_what_the_caller_sees() -> None:
    first = parsed_model(
        "g (float[4] x, float[4] z) => (float[4] y, float[4] w) { y = Add (x, z)  w = Sub (x, z) }"
    )
    other = parsed_model("g (float[4] z, float[4] x) => (float[4] y) { y = Add (x, z)  w = Sub (x, z) }")
    other.opset_imports[""] = 21
    changes = {
        (change.slot.value, change.name): (change.before, change.after) for change in diff(first, other).slots
    }
    assert changes == {
        ("opset", "ai.onnx"): ("20", "21"),
        ("input", "x"): ("position 0", "position 1"),
        ("input", "z"): ("position 1", "position 0"),
        ("output", "w"): ("float[4]", None),
    }


def test_inside_a_subgraph() -> None:
    text = """g (bool c, float[4, 4] x) => (float[4, 4] y) {
      y = If (c) <then_branch = t () => (float[4, 4] p) <float[4, 4] T = seeded%s> { p = MatMul (x, T) },
                  else_branch = e () => (float[4, 4] q) { q = %s (x) }> }"""
    assert difference(text % ("", "Exp"), text % ("", "Exp")).equal
    found = difference(text % ("", "Exp"), text % ("(0, 1)", "Neg"))
    assert [change.kind for group in found.layers for change in group.nodes] == [Kind.REPLACED]
    assert only_tensor(found).role in ("weight", "")


# --- weights ---


def _scaled(factor: object, *, index: int = 0) -> onnx.ModelProto:
    proto = mlp()
    tensor = proto.graph.initializer[index]
    array = (numpy_helper.to_array(tensor) * np.asarray(factor)).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return proto


def test_a_weight_that_moved() -> None:
    found = diff(ir.from_proto(mlp()), ir.from_proto(_scaled(1.0)))
    assert found.equal
    noise = 1 + 0.01 * np.random.default_rng(0).standard_normal((WIDTH, 64))
    change = only_tensor(diff(ir.from_proto(mlp()), ir.from_proto(_scaled(noise))))
    w = numpy_helper.to_array(mlp().graph.initializer[0]).astype(np.float64)
    gap = (w * noise).astype(np.float32) - w
    assert change.kind is Kind.CHANGED
    assert change.moved is not None
    assert change.moved.rescaled is None
    assert change.moved.relative == pytest.approx(np.linalg.norm(gap) / np.linalg.norm(w))
    assert change.moved.sqnr_db == pytest.approx(-20 * np.log10(np.linalg.norm(gap) / np.linalg.norm(w)))
    assert change.moved.max_abs == pytest.approx(np.abs(gap).max())


@pytest.mark.parametrize(("channels", "shape"), [("input", (WIDTH, 1)), ("output", (1, 64))])
def test_a_weight_that_was_rescaled(channels: str, shape: tuple[int, ...]) -> None:
    factors = np.random.default_rng(3).uniform(0.25, 4, shape)
    moved = only_tensor(diff(ir.from_proto(mlp()), ir.from_proto(_scaled(factors)))).moved
    assert moved is not None
    assert moved.rescaled is not None
    assert moved.rescaled.channels == channels
    assert (moved.rescaled.low, moved.rescaled.high) == pytest.approx(
        (factors.min(), factors.max()), rel=1e-6
    )
    assert moved.sqnr_db > 120  # what remains is the rounding of float32


def test_another_weight_is_not_called_rescaled() -> None:
    other = mlp()
    other.graph.initializer[0].CopyFrom(initializer("w1", WIDTH, 64, seed=77))
    moved = only_tensor(diff(ir.from_proto(mlp()), ir.from_proto(other))).moved
    assert moved is not None
    assert moved.rescaled is None
    assert -5 < moved.sqnr_db < 0  # unrelated: the noise is twice the signal


def test_tensors_that_cannot_be_compared() -> None:
    text = "g (float[4, 4] x) => (y) <float[4, %d] W = seeded> { y = MatMul (x, W) }"
    change = only_tensor(difference(text % 3, text % 5))
    assert (change.kind, change.moved, change.note) == (
        Kind.RETYPED,
        None,
        "not comparable: [4, 3] and [4, 5]",
    )
    text = "g (float[4, 6] x) => (y) <int64[2] s = {%s}> { y = Reshape (x, s) }"
    assert only_tensor(difference(text % "6, 4", text % "3, 8")).note == "[6,4] -> [3,8]"


def test_infinities_and_nan_at_equal_places_are_equal() -> None:
    for odd in (np.inf, -np.inf, np.nan):
        mask = np.where(np.arange(WIDTH) % 3, 0, odd).astype(np.float32)
        models = []
        for last in (1.0, 1.5):
            mask = mask.copy()
            mask[1] = last
            nodes = [helper.make_node("Add", ["x", "m"], ["y"])]
            models.append(ir.from_proto(model_of(nodes, [numpy_helper.from_array(mask, "m")])))
        moved = only_tensor(diff(*models)).moved
        assert moved is not None
        assert (moved.max_abs, moved.relative) == pytest.approx((0.5, 0.5))


# --- low precision ---
