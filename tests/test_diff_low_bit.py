# SPDX-License-Identifier: Apache-2.0
"""Differences of low-bit models: codes are turned back into numbers, whoever made them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from diffing import CALIBRATION, compiled, only_tensor, operators_of, parsed_model
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.calibrate import CalibrationDataReader
from small import mlp, saved

from splitfold.compiler import presets
from splitfold.compiler.debug.diff.graph_diff import diff
from splitfold.compiler.debug.diff.types import Kind
from splitfold.passes.base import Context
from splitfold.passes.pipeline import Pipeline
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.model_file import read_model

FORMS = {
    "quantize-weights{bits=8,block=16}": (40, 55, "com.microsoft::MatMulNBits"),
    "quantize-weights{bits=4,block=16}": (20, 30, "com.microsoft::MatMulNBits"),
    "quantize-weights{bits=4,block=32,symmetric=true}": (18, 28, "com.microsoft::MatMulNBits"),
    "quantize-weights{bits=2,block=16}": (4, 16, "com.microsoft::MatMulNBits"),
    "quantize-weights{bits=4,block=16,form=qdq}": (20, 30, ""),
    "quantize-activations{form=qdq}": (38, 50, ""),
    "quantize-activations{form=integer}": (38, 50, "com.microsoft::MatMulIntegerToFloat"),
    "quantize-dynamic": (38, 50, "MatMulInteger"),
}


@pytest.mark.parametrize("pipeline", FORMS)
def test_codes_are_turned_back_into_numbers(pipeline: str) -> None:
    low, high, operator = FORMS[pipeline]
    before, after = ir.from_proto(mlp()), ir.from_proto(mlp())
    Pipeline.parse(f"canonicalize,{pipeline}").run(after, Context(calibration=Calibration.of(CALIBRATION)))
    found, back = diff(before, after), diff(after, before)
    for layer in ("encoder.up", "encoder.down"):
        change, reverse = only_tensor(found, layer), only_tensor(back, layer)
        assert (change.kind, change.role) == (Kind.RETYPED, "weight")
        assert change.moved is not None
        assert reverse.moved is not None
        assert low < change.moved.sqnr_db < high
        assert reverse.moved.sqnr_db == pytest.approx(change.moved.sqnr_db, abs=1)
        assert change.after is not None
        assert change.after.parts  # its scales are not told as new
        replaced = operators_of(found, layer, Kind.REPLACED)
        assert [new[0] for _, new in replaced] == ([operator] if operator else [])
        assert all(old[0] == "MatMul" for old, _ in replaced)
    assert {change.kind for group in back.layers for change in group.nodes} <= {Kind.REMOVED, Kind.REPLACED}


def test_a_fused_layer_meets_all_its_ancestors() -> None:
    found = diff(ir.from_proto(mlp()), compiled(mlp(), str(presets.int8())))
    (up,) = operators_of(found, "encoder.up", Kind.REPLACED)
    assert up == (["MatMul", "Add"], ["com.microsoft::MatMulIntegerToFloat"])
    assert not [change for group in found.layers for change in group.nodes if change.kind is Kind.REMOVED]


@pytest.mark.parametrize(("bits", "low", "high"), [(8, 38, 50), (4, 18, 30)])
def test_tables(bits: int, low: float, high: float) -> None:
    text = "g (int64[n] i) => (float[n, 64] y) <float[50, 64] T = seeded> { y = Gather (T, i) }"
    before = parsed_model(text)
    after = before.clone()
    Pipeline.parse(f"canonicalize,quantize-embeddings{{bits={bits},min-bytes=1,block=16}}").run(after)
    for found in (diff(before, after), diff(after, before)):
        moved = only_tensor(found).moved
        assert moved is not None
        assert low < moved.sqnr_db < high
        assert found.summary.nodes_replaced == 1


def test_a_table_that_is_also_read_as_it_was() -> None:
    text = "g (int64[n] i, float[n, 64] x) => (y, z) <float[50, 64] T = seeded> %s"
    before = parsed_model(text % "{ y = Gather (T, i)  t = Transpose (T)  z = MatMul (x, t) }")
    after = before.clone()
    table = before.graph.initializers["T"].const_value
    assert table is not None
    half = ir.tensor(table.numpy().astype(np.float16), name="half")
    held = ir.Value(name="half", type=ir.TensorType(half.dtype), shape=half.shape, const_value=half)
    after.graph.register_initializer(held)
    after.graph.node(0).replace_input_with(0, held)
    found = diff(before, after)
    assert found.summary.tensors == (1, 2)
    assert only_tensor(found).after.name == "half"  # type: ignore[union-attr]
    assert found.summary.tensors_removed == 0


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self._left = [dict(feeds) for feeds in CALIBRATION]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self._left.pop() if self._left else None


@pytest.mark.parametrize("form", ["dynamic", QuantFormat.QDQ, QuantFormat.QOperator])
def test_a_model_that_another_quantizer_made(tmp_path: Path, form: object) -> None:
    source, made = saved(mlp(), tmp_path / "m.onnx"), tmp_path / "q.onnx"
    if form == "dynamic":
        quantize_dynamic(source, made, weight_type=QuantType.QInt8)
    else:
        quantize_static(source, made, _Reader(), quant_format=form, weight_type=QuantType.QInt8)
    found = diff(read_model(source), read_model(made))
    for layer in ("encoder.up", "encoder.down"):
        moved = only_tensor(found, layer).moved
        assert moved is not None
        assert 30 < moved.sqnr_db < 50
    assert {layer.layer for layer in found.layers} <= {"encoder.up", "encoder.down", "encoder.act"}
    removed = [
        change.before[0].operator for layer in found.layers for change in layer.nodes if not change.after
    ]
    assert removed == (["Relu"] if form is QuantFormat.QOperator else [])  # the grid does its work
    if form is QuantFormat.QDQ:
        assert (["Add", "Relu"], ["Add"]) in operators_of(found, "encoder.up", Kind.REPLACED)


# --- names ---


def test_counted_names_of_two_exporters_are_not_believed() -> None:
    operators = ["Relu", "Exp", "Neg", "Abs", "Sqrt", "Tanh", "Sin", "Cos", "Erf", "Floor"]
    chain = "g (float[4] x) => (float[4] y) {{ v0 = Log (x)  {0}  y = Add (v{1}, x) }}"

    def model(chosen: list[str]) -> ir.Model:
        steps = "  ".join(f"v{at + 1} = {name} (v{at})" for at, name in enumerate(chosen))
        made = parsed_model(chain.format(steps, len(chosen)))
        for node in made.graph:
            node.name = f"{'n' if chosen[0] == 'Relu' else 'm'}{node.op_type}"
        return made

    found = diff(model(operators), model(["Ceil", *operators]))
    assert found.summary.nodes_replaced == 0
    assert (found.summary.nodes_added, found.summary.nodes_removed) == (
        11,
        10,
    )  # all but the first and the last
    one = diff(model(operators), model([*operators[:4], "Ceil", *operators[5:]]))  # the names of one exporter
    assert (one.summary.nodes_replaced, one.summary.nodes_added) == (1, 0)
