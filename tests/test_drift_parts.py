# SPDX-License-Identifier: Apache-2.0
"""The parts of drift: sums, padding, slices and what is said of a cause."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from drift_models import LOWEST, attention, changed, rows, tokens, tower
from onnx import TensorProto, helper

from splitfold.compiler.debug.drift import measurement as drift_module
from splitfold.compiler.debug.drift import slices as slices_module
from splitfold.compiler.debug.drift.cause_fit import fit_note
from splitfold.compiler.debug.drift.cause_grid import grid_note, grids
from splitfold.compiler.debug.drift.measure import Measured
from splitfold.compiler.debug.drift.measurement import drift
from splitfold.compiler.debug.drift.padding import Padding, find_padding
from splitfold.compiler.debug.drift.sums import Sums
from splitfold.compiler.errors import ComparisonError
from splitfold.runtime.compare import Deviation, deviation
from splitfold.runtime.errors import SessionError
from splitfold.runtime.model_file import weight_bytes
from splitfold.runtime.session import Session


def summed(*pairs: tuple[Any, Any]) -> Deviation:
    sums = Sums()
    for reference, actual in pairs:
        sums.add(np.asarray(reference), np.asarray(actual))
    return sums.deviation()


def test_sums_are_those_of_deviation() -> None:
    rng = np.random.default_rng(0)
    pairs = [(rng.standard_normal((3, n)), rng.standard_normal((3, n))) for n in (5, 7)]
    expected = deviation(*zip(*pairs, strict=True))
    found = summed(*pairs)
    for name in ("max_abs", "relative", "cosine", "sqnr_db", "top1"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name))


@pytest.mark.parametrize("sentinel", [LOWEST, -np.inf, -3e38])
def test_a_mask_does_not_hide_the_rest(sentinel: float) -> None:
    reference = np.array([1.0, 2.0, LOWEST, LOWEST], np.float32)
    actual = np.array([1.5, 2.0, sentinel, LOWEST], np.float32)
    assert summed((reference, actual)).relative == pytest.approx(0.5 / math.sqrt(5))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e30, 0.0])
def test_a_sentinel_or_nan_on_one_side_is_a_total_error(wrong: float) -> None:
    reference = np.array([1.0, LOWEST if wrong != np.nan else 2.0], np.float32)
    found = summed((reference, np.array([1.0, wrong], np.float32)))
    assert (found.relative, found.cosine, found.sqnr_db) == (math.inf, 0.0, -math.inf)
    assert summed((np.array([np.nan, 1.0]), np.array([np.nan, 1.0]))).max_abs == 0


def test_another_shape_is_a_total_error() -> None:
    assert summed((np.zeros((2, 3)), np.zeros((3, 2)))).relative == math.inf


def test_flags_and_indices_are_compared_by_value() -> None:
    assert summed(([True, False], [True, False])).max_abs == 0
    assert summed(([3, 4], [3, 5])).relative == pytest.approx(0.2)
    assert summed((np.array([2**31], np.uint32), np.array([2**31], np.int64))).max_abs == 0


def test_padding_is_left_out_along_the_axes_of_the_mask() -> None:
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    padding, feeds = Padding("mask"), {"mask": mask}
    states = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    assert np.array_equal(padding.without(feeds, states), states[mask != 0])
    heads = np.arange(2 * 5 * 3 * 3).reshape(2, 5, 3, 3)
    assert padding.without(feeds, heads).shape == (3, 5, 3)
    assert np.array_equal(padding.without(feeds, heads)[2], heads[1, :, 0])
    flat = np.arange(6 * 4).reshape(6, 4)
    assert np.array_equal(padding.without(feeds, flat), flat[[0, 1, 3]])
    assert padding.without(feeds, np.zeros(7)).shape == (7,)
    assert Padding().without(feeds, states) is states


def test_only_an_input_that_can_mark_padding_is_taken() -> None:
    model = ir.from_proto(attention(1))
    assert find_padding(model, "attention_mask").input == "attention_mask"
    assert find_padding(ir.from_proto(tower(1)), "attention_mask").input is None
    assert find_padding(model, None).input is None
    with pytest.raises(ComparisonError, match=r"no input 'atention_mask'.*Did you mean 'attention_mask'"):
        find_padding(model, "atention_mask")
    with pytest.raises(ComparisonError, match="whole numbers"):
        find_padding(model, "x")


def test_what_stands_at_padding_does_not_count() -> None:
    reference, feeds = attention(1), tokens()
    whole = drift(reference, changed(reference, "ow0", 1.2), feeds, padding=None)
    kept = drift(reference, changed(reference, "ow0", 1.2), feeds)
    assert (whole.padding, kept.padding) == (None, "attention_mask")
    mask = feeds["attention_mask"] != 0
    outputs = [
        Session(ir.from_proto(m)).run(feeds)["y0"] for m in (reference, changed(reference, "ow0", 1.2))
    ]
    expected = deviation(*([array[mask]] for array in outputs))
    assert kept.outputs["y0"].relative == pytest.approx(expected.relative)
    assert whole.outputs["y0"].relative != pytest.approx(expected.relative, rel=1e-6)
    assert kept.sources()[0].impact.relative == pytest.approx(expected.relative, rel=1e-4)


class Spy:
    """Watches what `drift` holds: bytes of values, and of the weights of each session."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values, self.weights = 0, 0
        measure, session = drift_module.measure, slices_module.Session

        def measured(*arguments: Any) -> Measured:
            found = measure(*arguments)
            self.values = found.peak
            return found

        def opened(model: ir.Model, *arguments: Any, **options: Any) -> Session:
            self.weights = max(self.weights, weight_bytes(model))
            return session(model, *arguments, **options)

        monkeypatch.setattr(drift_module, "measure", measured)
        monkeypatch.setattr(slices_module, "Session", opened)


def test_slices_bound_memory_and_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = tower(24)
    actual = changed(changed(reference, "w3", 1.05), "w17", 0.97)
    batches = [rows(256, seed=seed) for seed in range(3)]
    spy = Spy(monkeypatch)
    whole, unbounded = drift(reference, actual, batches), (spy.values, spy.weights)
    spy.weights, limit = 0, 250_000
    parts = drift(reference, actual, batches, slice_bytes=limit)
    assert (whole.slices, parts.slices > 6) == (1, True)
    assert parts.points == whole.points
    assert parts.outputs == whole.outputs
    assert spy.weights <= limit < unbounded[1] * 3
    inputs = 3 * batches[0]["x"].nbytes
    assert spy.values < 2 * limit + inputs < unbounded[0]


def test_slices_carry_what_a_later_one_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = attention(3)
    actual = changed(reference, "vw1", 1.1)
    spy = Spy(monkeypatch)
    whole = drift(reference, actual, [tokens(0), tokens(1)])
    parts = drift(reference, actual, [tokens(0), tokens(1)], slice_bytes=20_000)
    assert parts.slices > 3
    assert parts.points == whole.points
    assert spy.weights > 0


def test_a_value_that_cannot_be_held_is_computed_again() -> None:
    """A sequence is no array: the slice that reads it makes it itself."""
    reference = tower(3)
    reference.graph.node.extend(
        [
            helper.make_node("SequenceConstruct", ["r0", "r2"], ["both"], name="/list"),
            helper.make_node("ConcatFromSequence", ["both"], ["y"], axis=1, name="/join"),
        ]
    )
    reference.graph.output[0].name = "y"
    actual = changed(reference, "w1", 1.1)
    whole, parts = (drift(reference, actual, rows(), slice_bytes=size) for size in (10**9, 5_000))
    assert parts.slices > whole.slices
    assert parts.points == whole.points
    assert "list: it is no tensor" not in [point.layer for point in whole.points]


def test_a_part_that_does_not_run_costs_no_other_its_local_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = slices_module.Slice.run

    def failing(part: slices_module.Slice, held: Any) -> Any:
        if "m1" in part.wanted and "r0__fed" in part.given:
            raise SessionError("no kernel")
        return run(part, held)

    monkeypatch.setattr(slices_module.Slice, "run", failing)
    found = drift(tower(3), changed(changed(tower(3), "w1", 1.1), "b2", 2.0), rows())
    assert [point.value for point in found.points if point.local is None] == ["m1"]
    assert [point.value for point in found.sources()] == ["a2"]
    assert "the local error of 'm1' is not measured: no kernel" in caplog.text


def quantize(scale: float, low: int = 0, dtype: Any = np.uint8) -> ir.Node:
    step = ir.tensor(np.array(scale, np.float32), name="step")
    zero = ir.tensor(np.array(low, dtype), name="zero")
    constants = [ir.Value(name=t.name, const_value=t, type=ir.TensorType(t.dtype)) for t in (step, zero)]
    node = ir.node("QuantizeLinear", [ir.Value(name="x"), *constants])
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=constants)
    assert graph
    return node


def note(node: ir.Node, x: np.ndarray, local: float = 0.01) -> str:
    return grid_note(grids([node]), {"x": x}, lambda name: name, local)


def test_a_grid_is_called_too_wide_clipped_or_spoilt_by_a_channel() -> None:
    x = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    assert note(quantize(3.0, 128), x).startswith("its input 'x' goes through a grid of step 3, wider")
    assert "clipped" in note(quantize(0.005, 128), x)
    assert note(quantize(0.05, 0, np.int8), x, local=0.5) == ""
    outlier = x.copy()
    outlier[:, 5] *= 100
    text = note(quantize(2.0, 128), outlier)
    assert text.startswith("its input 'x' is rounded to steps of 2")
    assert "channel 5 reaches" in text
    masked = np.append(x, np.full((1, 16), LOWEST, np.float32), 0)
    assert "made so by the -3.4e+38 in it" in note(quantize(1e36, 255), masked)


def test_a_fit_is_named_only_where_it_explains_the_difference() -> None:
    x = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    shift = np.linspace(1, 2, 16, dtype=np.float32)
    assert fit_note(x, -x) == "it is -1 times the reference"
    assert fit_note(x, 0 * x) == "it is all zeros"
    assert "constant for each channel" in fit_note(x, x + shift)
    assert fit_note(x, x * 1.5 + shift).startswith("it is 1.5 times the reference but for a constant")
    noise = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    assert fit_note(x, x + noise) == ""
    images = np.random.default_rng(2).standard_normal((4, 8, 5, 5)).astype(np.float32)
    assert "constant for each channel" in fit_note(images, images + np.arange(8).reshape(1, 8, 1, 1))


def test_the_largest_number_of_half_precision_stands_for_infinity_too() -> None:
    reference = np.array([1.0, LOWEST], np.float32)
    assert summed((reference, np.array([1.0, -65504], np.float16))).max_abs == 0
    assert summed((reference, np.array([1.0, 65504], np.float16))).relative == math.inf


def test_numbers_of_half_precision_are_fed_in_their_type() -> None:
    """A model computed in float16 is off by its rounding, and that is no source."""
    reference = tower(2)
    actual = onnx.ModelProto()
    actual.CopyFrom(reference)
    for tensor in actual.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    actual.graph.node[0].input[0] = "x16"
    actual.graph.node.insert(0, helper.make_node("Cast", ["x"], ["x16"], to=TensorProto.FLOAT16, name="/in"))
    actual.graph.node[-1].output[0] = "r1_half"
    actual.graph.node.append(
        helper.make_node("Cast", ["r1_half"], ["r1"], to=TensorProto.FLOAT, name="/block.1/out")
    )
    found = drift(reference, actual, rows())
    assert found.sources() == []
    assert 0 < found.outputs["r1"].relative < 5e-3
