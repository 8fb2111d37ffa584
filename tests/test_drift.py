# SPDX-License-Identifier: Apache-2.0
"""Drift: where an error arises, what it does, and what only drags it along."""

from __future__ import annotations

import json
import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from drift_models import (
    Feeds,
    changed,
    copied,
    model,
    node,
    round_trip,
    rows,
    tower,
)
from onnx import TensorProto, helper, numpy_helper
from small import initializer

from splitfold.compiler import Pipeline, compile, presets
from splitfold.compiler.debug.drift.measurement import Drift, Point, drift
from splitfold.compiler.errors import ComparisonError
from splitfold.passes.errors import SpecError
from splitfold.runtime.compare import deviation
from splitfold.runtime.errors import CalibrationError
from splitfold.runtime.session import Session


def at(found: Drift, value: str) -> Point:
    return next(point for point in found.points if point.value == value)


def values(proto: onnx.ModelProto, names: list[str], feeds: Feeds) -> dict[str, np.ndarray]:
    return Session(ir.from_proto(proto)).run(feeds, names)


def test_equal_models_have_no_source() -> None:
    found = drift(tower(), tower(), rows())
    assert [point.value for point in found.points] == ["m0", "a0", "r0", "m1", "a1", "r1", "m2", "a2", "r2"]
    assert found.sources() == []
    assert all(point.accumulated.max_abs == 0 and point.local.max_abs == 0 for point in found.points)
    assert found.outputs["r2"].max_abs == 0
    assert found.unmatched == ()


def test_a_scaled_weight_is_the_one_source() -> None:
    found = drift(tower(), changed(tower(), "w1", 1.01), rows())
    [source] = found.sources()
    assert (source.layer, source.value, source.operator) == ("block.1", "m1", "MatMul")
    assert source.local.relative == pytest.approx(0.01, rel=1e-3)
    assert source.note == "it is 1.01 times the reference"
    assert found.ranked()[0] == source


def test_what_lies_behind_a_source_is_dragged_along() -> None:
    found = drift(tower(), changed(tower(), "w0", 1.5), rows())
    for point in found.points[1:]:
        assert point.accumulated.relative > 0.01
        assert point.local.relative < 1e-6
        assert not point.source
    assert found.ranked()[0].value == "m0"


def test_depth_is_the_longest_way_from_an_input() -> None:
    found = drift(tower(2), tower(2), rows())
    assert [point.depth for point in found.points] == [1, 2, 3, 4, 5, 6]


def test_a_dropped_bias_is_recognised() -> None:
    found = drift(tower(), changed(tower(), "b1", 0.0), rows(64))
    [source] = found.sources()
    assert (source.layer, source.value) == ("block.1", "a1")
    assert "constant for each channel" in source.note


def test_swapped_inputs_are_recognised() -> None:
    weights = [initializer(name, 32, 32, seed=seed) for seed, name in enumerate(("u", "v"))]
    nodes = [
        helper.make_node("MatMul", ["x", "u"], ["left"], name="/left/MatMul"),
        helper.make_node("MatMul", ["x", "v"], ["right"], name="/right/MatMul"),
        helper.make_node("Sub", ["left", "right"], ["gap"], name="/gap/Sub"),
        helper.make_node("Sigmoid", ["gap"], ["y"], name="/end/Sigmoid"),
    ]
    reference = model(nodes, weights, {"x": (TensorProto.FLOAT, ["n", 32])}, ["y"])
    actual = copied(reference)
    node(actual, "/gap/Sub").input[:] = ["right", "left"]
    [source] = drift(reference, actual, rows()).sources()
    assert source.layer == "gap"
    assert source.note == (
        "it reads its inputs in another order: 'right', 'left', the reference 'left', 'right'"
    )


def _behind(product: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    """Return what a tower of three makes of its first product."""
    value = np.maximum(product + weights["b0"], 0)
    for index in (1, 2):
        value = np.maximum(value @ weights[f"w{index}"] + weights[f"b{index}"], 0)
    return value


def test_impact_is_what_the_local_error_alone_does() -> None:
    feeds, reference = rows(), tower()
    actual = changed(changed(reference, "w0", 1.02), "w2", 0.9)
    found = drift(reference, actual, feeds)
    assert {point.value for point in found.sources()} == {"m0", "m2"}
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in reference.graph.initializer}
    exact, moved = feeds["x"] @ weights["w0"], feeds["x"] @ weights["w0"] * np.float32(1.02)
    expected = deviation(*([_behind(start, weights)] for start in (exact, moved)))
    assert at(found, "m0").impact.relative == pytest.approx(expected.relative, rel=1e-3)
    assert at(found, "m1").impact is None


def test_sources_are_ranked_by_impact_not_by_local_error() -> None:
    """The side branch is far off, and its weight in the output is nearly nothing."""
    nodes = [
        helper.make_node("MatMul", ["x", "u"], ["side"], name="/side/MatMul"),
        helper.make_node("Mul", ["side", "tiny"], ["hint"], name="/hint/Mul"),
        helper.make_node("MatMul", ["x", "v"], ["main"], name="/main/MatMul"),
        helper.make_node("Add", ["main", "hint"], ["y"], name="/end/Add"),
    ]
    weights = [initializer("u", 32, 32), initializer("v", 32, 32, seed=1)]
    weights.append(numpy_helper.from_array(np.array(1e-4, np.float32), "tiny"))
    reference = model(nodes, weights, {"x": (TensorProto.FLOAT, ["n", 32])}, ["y"])
    found = drift(reference, changed(changed(reference, "u", 2.0), "v", 1.01), rows())
    assert [point.layer for point in found.sources()] == ["main", "side"]
    assert at(found, "side").local.relative > at(found, "main").local.relative
    few = drift(reference, changed(changed(reference, "u", 2.0), "v", 1.01), rows(), suspects=1)
    assert [point.impact is None for point in few.sources()] == [False, True]


def test_all_batches_count() -> None:
    batches = [rows(4, seed=seed) for seed in range(5)]
    whole = {"x": np.concatenate([feeds["x"] for feeds in batches])}
    actual = changed(tower(), "w0", 1.1)
    parts, one = drift(tower(), actual, batches), drift(tower(), actual, whole)
    assert (parts.batches, one.batches) == (5, 1)
    for first, second in zip(parts.points, one.points, strict=True):
        assert first.accumulated.relative == pytest.approx(second.accumulated.relative, rel=1e-6)
        assert first.local.relative == pytest.approx(second.local.relative, rel=1e-6, abs=1e-7)


def test_a_value_that_stands_in_several_places_is_cut_at_all_of_them() -> None:
    reference, actual = round_trip()
    feeds = rows(64)
    found = drift(reference, actual, feeds)
    h = values(reference, ["h"], feeds)["h"]
    rounded = lambda x: np.clip(np.rint(x / 0.05), -128, 127) * np.float32(0.05)  # noqa: E731
    assert at(found, "h").actual == "grid"
    assert at(found, "h").through == ("MatMul", "QuantizeLinear", "DequantizeLinear")
    own = deviation([h], [rounded(h * np.float32(1.01))])
    assert at(found, "h").local.relative == pytest.approx(own.relative, rel=1e-3)
    assert at(found, "before").local.max_abs == 0
    assert at(found, "after").local.max_abs == 0
    assert at(found, "beside").local.relative == pytest.approx(
        deviation([h], [rounded(h)]).relative, rel=1e-3
    )
    assert at(found, "beside").note.startswith("its input 'h' is rounded to steps of 0.05")


@pytest.mark.parametrize("preset", ["int8", "int4"])
def test_a_compiled_model_meets_its_source(preset: str) -> None:
    feeds = rows(64)
    artifact = compile(tower(), calibration=feeds, pipeline=presets.preset(preset))
    found = drift(tower(), artifact, feeds)
    assert found.unmatched == ()
    sources = {point.layer for point in found.sources()}
    assert sources == {"block.0", "block.1", "block.2"}
    assert all(point.local.relative < 0.2 and point.note for point in found.sources())


def test_an_exact_compilation_has_no_source() -> None:
    artifact = compile(tower(), calibration=rows(), pipeline=presets.exact())
    assert drift(tower(), artifact, rows()).sources() == []


def test_synthetic_inputs_serve_without_data() -> None:
    found = drift(tower(), changed(tower(), "w0", 1.1))
    assert found.batches == 1
    assert found.ranked()[0].layer == "block.0"


def test_functions_are_seen_through() -> None:
    body = [
        helper.make_node("MatMul", ["a", "w"], ["t"], name="product"),
        helper.make_node("Tanh", ["t"], ["b"], name="squash"),
    ]
    function = helper.make_function("local", "Dense", ["a", "w"], ["b"], body, [helper.make_opsetid("", 20)])
    nodes = [
        helper.make_node("Dense", ["x", "w0"], ["h"], domain="local", name="first"),
        helper.make_node("Dense", ["h", "w1"], ["y"], domain="local", name="second"),
    ]
    weights = [initializer("w0", 32, 32), initializer("w1", 32, 32, seed=1)]
    reference = model(nodes, weights, {"x": (TensorProto.FLOAT, ["n", 32])}, ["y"])
    reference.opset_import.append(helper.make_opsetid("local", 1))
    reference.functions.append(function)
    [source] = drift(reference, changed(reference, "w1", 1.1), rows()).sources()
    assert source.layer.startswith("second")
    assert source.operator == "MatMul"


def test_a_subgraph_is_one_operator() -> None:
    branch = [
        helper.make_graph(
            [helper.make_node(op, ["h"], [f"{op}_out"], name=f"/{op}")],
            op,
            [],
            [helper.make_tensor_value_info(f"{op}_out", TensorProto.FLOAT, None)],
        )
        for op in ("Tanh", "Neg")
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="/dense/MatMul"),
        helper.make_node(
            "If", ["yes"], ["c"], name="/choice/If", then_branch=branch[0], else_branch=branch[1]
        ),
        helper.make_node("Exp", ["c"], ["y"], name="/end/Exp"),
    ]
    weights = [initializer("w", 32, 32), numpy_helper.from_array(np.array(True), "yes")]
    reference = model(nodes, weights, {"x": (TensorProto.FLOAT, ["n", 32])}, ["y"])
    found = drift(reference, changed(reference, "w", 1.2), rows())
    assert [(point.value, point.source) for point in found.points] == [
        ("h", True),
        ("c", False),
        ("y", False),
    ]


def test_lists_of_integers_may_change_their_length_or_fix_a_rank() -> None:
    """A count of rows changes with the batch; of the sizes of a Resize the runtime wants to know how many."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], name="/shape/Shape"),
        helper.make_node("Gather", ["shape", "zero"], ["count"], name="/count/Gather"),
        helper.make_node("Range", ["zero", "count", "one"], ["steps"], name="/steps/Range"),
        helper.make_node("Gather", ["x", "steps"], ["rows"], name="/rows/Gather"),
        helper.make_node("Reshape", ["rows", "image"], ["pixels"], name="/pixels/Reshape"),
        helper.make_node("Mul", ["pixels", "gain"], ["bright"], name="/bright/Mul"),
        helper.make_node("Unsqueeze", ["count", "axis"], ["first"], name="/first/Unsqueeze"),
        helper.make_node("Concat", ["first", "rest"], ["sizes"], axis=0, name="/sizes/Concat"),
        helper.make_node("Resize", ["bright", "", "", "sizes"], ["y"], name="/resize/Resize"),
    ]
    numbers = {"zero": 0, "one": 1, "axis": [0], "image": [-1, 1, 4, 8], "rest": [1, 8, 16]}
    weights = [numpy_helper.from_array(np.array(v, np.int64), name) for name, v in numbers.items()]
    weights.append(numpy_helper.from_array(np.array(2, np.float32), "gain"))
    reference = model(nodes, weights, {"x": (TensorProto.FLOAT, ["n", 32])}, ["y"])
    found = drift(reference, changed(reference, "gain", 1.1), [rows(4), rows(7)])
    assert [point.value for point in found.points if point.local is None] == []
    assert [point.value for point in found.sources()] == ["bright"]


def test_grids_read_by_several_layers_are_judged_together() -> None:
    """Each reader's error is small at the output; the outlier in what they read hits all of them."""
    nodes, weights = [], [initializer("w", 32, 32)]
    for index in range(3):
        nodes.append(
            helper.make_node("MatMul", ["h", f"u{index}"], [f"p{index}"], name=f"/read.{index}/MatMul")
        )
        weights.append(initializer(f"u{index}", 32, 32, seed=index + 1))
    head = helper.make_node("MatMul", ["x", "w"], ["h"], name="/dense/MatMul")
    tail = helper.make_node("Sum", ["p0", "p1", "p2"], ["y"], name="/sum/Sum")
    reference = model([head, *nodes, tail], weights, {"x": (TensorProto.FLOAT, ["n", 32])}, ["y"])
    feeds = rows(64)
    text = "canonicalize,quantize-activations"
    found = drift(reference, compile(reference, calibration=feeds, pipeline=text), feeds)
    readers = [at(found, f"p{index}") for index in range(3)]
    assert len({point.impact for point in readers}) == 1
    assert readers[0].impact.relative == pytest.approx(at(found, "y").accumulated.relative, rel=0.5)


def test_another_shape_is_a_total_error_at_its_place() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="/dense/MatMul"),
        helper.make_node("Reshape", ["h", "shape"], ["folded"], name="/fold/Reshape"),
        helper.make_node("Relu", ["folded"], ["act"], name="/act/Relu"),
        helper.make_node("Reshape", ["act", "flat"], ["y"], name="/end/Reshape"),
    ]
    shapes = {"shape": [-1, 4, 8], "flat": [-1, 32]}
    weights = [numpy_helper.from_array(np.array(v, np.int64), name) for name, v in shapes.items()]
    weights.append(initializer("w", 32, 32))
    reference = model(nodes, weights, {"x": (TensorProto.FLOAT, ["n", 32])}, ["y"])
    actual = copied(reference)
    actual.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.array([-1, 8, 4], np.int64), "shape"))
    found = drift(reference, actual, rows())
    [source] = found.sources()
    assert source.value == "folded"
    assert source.accumulated.relative == math.inf
    assert source.note == "its shape is [16, 8, 4], the reference's [16, 4, 8]"
    assert at(found, "act").local is None


def test_nan_on_one_side_is_a_total_error_and_named() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="/dense/MatMul"),
        helper.make_node("Add", ["h", "shift"], ["moved"], name="/shift/Add"),
        helper.make_node("Sqrt", ["moved"], ["root"], name="/square_root/Sqrt"),
        helper.make_node("Sigmoid", ["root"], ["y"], name="/end/Sigmoid"),
    ]
    weights = [initializer("w", 32, 32), numpy_helper.from_array(np.array(10, np.float32), "shift")]
    reference = model(nodes, weights, {"x": (TensorProto.FLOAT, ["n", 32])}, ["y"])
    found = drift(reference, changed(reference, "shift", -1.0), rows())
    [source] = found.sources()
    assert source.layer == "shift"
    assert at(found, "root").accumulated.relative == math.inf
    assert at(found, "root").note.startswith("512 elements are NaN")
    assert found.outputs["y"].sqnr_db == -math.inf


def test_layers_are_chosen_by_pattern() -> None:
    found = drift(tower(), changed(tower(), "w1", 1.1), rows(), only=["block.[12]"])
    assert {point.layer for point in found.points} == {"block.1", "block.2"}
    assert found.ranked()[0].layer == "block.1"
    with pytest.raises(SpecError, match=r"no layer matches 'blok.1'. Did you mean 'block.1'\?"):
        drift(tower(), tower(), rows(), only=["blok.1"])


def test_rows_by_layer_and_as_json() -> None:
    found = drift(tower(), changed(tower(), "b1", 3.0), rows())
    assert {layer: point.value for layer, point in found.by_layer().items()} == {
        "block.0": "r0",
        "block.1": "a1",
        "block.2": "r2",
    }
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    first = next(point for point in plain["points"] if point["rank"] == 1)
    assert (first["value"], first["source"]) == ("a1", True)
    assert plain["points"][0]["accumulated"]["sqnr_db"] == "inf"
    assert plain["outputs"]["r2"]["relative"] == found.outputs["r2"].relative


def test_models_of_other_inputs_are_refused() -> None:
    other = tower()
    other.graph.input[0].name = "z"
    other.graph.node[0].input[0] = "z"
    with pytest.raises(ComparisonError, match="lacks the input 'x' of the reference"):
        drift(tower(), other, rows())
    wider = tower()
    wider.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    with pytest.raises(ComparisonError, match="input 'x' is FLOAT in the reference and DOUBLE"):
        drift(tower(), wider, rows())


def test_models_of_other_outputs_are_refused() -> None:
    with pytest.raises(ComparisonError, match="lacks the output 'r1' of the reference"):
        drift(tower(outputs=["r1", "r2"]), tower(), rows())
    with pytest.raises(ComparisonError, match="has the output 'r1', which the reference lacks"):
        drift(tower(), tower(outputs=["r1", "r2"]), rows())


def test_models_without_a_common_layer_are_refused() -> None:
    stranger = tower()
    for item in stranger.graph.node:
        item.name = f"other{item.name}"
        item.input[:] = [name if name == "x" or name[0] in "wb" else f"{name}_" for name in item.input]
        item.output[:] = [name if name == "r2" else f"{name}_" for name in item.output]
    with pytest.raises(ComparisonError, match=r"no layer in common.*keeps the names of values"):
        drift(tower(), stranger, rows())


def test_data_that_does_not_fit_is_refused() -> None:
    with pytest.raises(CalibrationError, match="expects"):
        drift(tower(), tower(), {"x": np.zeros((4, 7), np.float32)})


def test_a_pipeline_stage_meets_another() -> None:
    """Two stages of one compilation: the later one may hold values that the original does not know."""
    feeds = rows(64)
    stage = compile(
        tower(), calibration=feeds, pipeline=Pipeline.parse("canonicalize,quantize-weights{bits=8}")
    )
    found = drift(stage, stage.model, feeds)
    assert found.sources() == []
    assert len(found.points) >= 9
