# SPDX-License-Identifier: Apache-2.0
"""The runtime profile: events become medians, kernels meet their layers, rows add up; no time is judged."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from command_line import Run, assert_failed
from encoder import encoder, token_batches
from onnx import TensorProto, helper
from small import initializer, mlp, samples, saved

from splitfold.compiler import Tolerance, compile, presets
from splitfold.compiler.debug.profile.kernels import match_kernels
from splitfold.compiler.debug.profile.times import (
    ModelTime,
    OperatorTime,
    Profile,
    ProfileRow,
    RowTime,
    profile,
)
from splitfold.passes.base import Findings
from splitfold.passes.canonicalize import name_all
from splitfold.runtime.errors import SessionError, UnsupportedError
from splitfold.runtime.feeds import Feeds, synthetic_feeds
from splitfold.runtime.model_file import read_model
from splitfold.runtime.profile import read_events, trace
from splitfold.runtime.session import optimized_graph
from splitfold.runtime.target import Target

_ANY = Tolerance(cosine=None)
_SHARED = Path(os.environ.get("SPLITFOLD_SHARED", Path(__file__).parents[2] / "shared")) / "models"
_EMPTY = ir.Model(ir.Graph([], [], nodes=[]), ir_version=9)


# --- events ---


def _kernel(name: str, operator: str, start: int, took: int) -> dict[str, Any]:
    return {
        "cat": "Node",
        "name": f"{name}_kernel_time",
        "ts": start,
        "dur": took,
        "args": {"op_name": operator},
    }


def _run(start: int, took: int) -> dict[str, Any]:
    return {"cat": "Session", "name": "model_run", "ts": start, "dur": took, "args": {}}


def test_medians_leave_untimed_runs_out() -> None:
    events = []
    for at, took in enumerate((90, 10, 30, 20)):  # the first one warms up
        events += [_run(1000 * at, took + 5), _kernel("a", "MatMul", 1000 * at + 1, took)]
    found = read_events(events, [False, True, True, True], _EMPTY)
    assert [(item.node, item.operator, item.microseconds) for item in found.kernels] == [("a", "MatMul", 20)]
    assert (found.run_us, found.outside_us, found.runs) == (25, 5, 3)


def test_control_flow_is_counted_without_its_bodies() -> None:
    events = [
        _run(0, 100),
        _kernel("loop", "Loop", 10, 60),
        _kernel("body", "Add", 12, 20),
        _kernel("body", "Add", 40, 10),
        _kernel("after", "Mul", 75, 5),
    ]
    found = read_events(events, [True], _EMPTY)
    assert {item.node: item.microseconds for item in found.kernels} == {"loop": 30, "body": 30, "after": 5}
    assert found.outside_us == 100 - 65


def test_a_branch_that_was_not_taken_took_nothing() -> None:
    events = [_run(0, 50), _kernel("then", "Add", 1, 9), _run(100, 50), _run(200, 50)]
    (kernel,) = read_events(events, [True] * 3, _EMPTY).kernels
    assert kernel.microseconds == 0


def test_a_profile_without_runs_is_an_error() -> None:
    with pytest.raises(SessionError, match="no run"):
        read_events([_kernel("a", "Add", 1, 2)], [True], _EMPTY)


def test_the_runtime_reports_every_node_once_a_run() -> None:
    model = ir.from_proto(mlp())
    first, second = trace([model, model], {"x": samples()}, runs=7, warm_up=1)
    assert first.runs == second.runs == 7
    assert {item.operator for item in first.kernels} == {item.operator for item in second.kernels}
    assert {node.name for node in first.graph.graph} >= {item.node for item in first.kernels}


# --- which nodes a kernel computes ---


def _convolutions() -> onnx.ModelProto:
    """Return conv, clip, depthwise conv, clip, conv, residual add and relu: they run in another layout."""
    make = helper.make_node
    same = {"kernel_shape": [1, 1]}
    nodes = [
        make("Conv", ["x", "k0"], ["a"], name="/b0/conv/Conv", **same),
        make("Clip", ["a", "zero", "six"], ["b"], name="/b0/act/Clip"),
        make("Conv", ["b", "k1"], ["c"], name="/b1/conv/Conv", kernel_shape=[3, 3], group=16, pads=[1] * 4),
        make("Clip", ["c", "zero", "six"], ["d"], name="/b1/act/Clip"),
        make("Conv", ["d", "k2"], ["e"], name="/b2/conv/Conv", **same),
        make("Add", ["e", "b"], ["f"], name="/b2/Add"),
        make("Relu", ["f"], ["g"], name="/b2/act/Relu"),
        make("GlobalAveragePool", ["g"], ["p"], name="/pool/GlobalAveragePool"),
        make("Flatten", ["p"], ["q"], name="/flat/Flatten"),
        make("Gemm", ["q", "w"], ["y"], name="/head/Gemm"),
    ]
    bounds = [onnx.numpy_helper.from_array(np.float32(v), n) for n, v in (("zero", 0.0), ("six", 6.0))]
    weights = [
        initializer("k0", 16, 16, 1, 1),
        initializer("k1", 16, 1, 3, 3, seed=1),
        initializer("k2", 16, 16, 1, 1, seed=2),
        initializer("w", 16, 10, seed=3),
    ]
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])],
        [*weights, *bounds],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


_IMAGE: Feeds = {"x": np.random.default_rng(0).standard_normal((1, 16, 8, 8)).astype(np.float32)}


def _origins(model: ir.Model) -> dict[tuple[str, ...], str]:
    """Return the operator of each kernel by the names of the nodes that it computes, Q/DQ left out."""
    name_all(model, Findings())
    kernels = match_kernels(model, optimized_graph(model, Target.cpu()))
    named = [(kernel, [node.name or "" for node in kernel.significant]) for kernel in kernels]
    return {tuple(sorted(names)): kernel.node.op_type for kernel, names in named if names}


def test_fused_convolutions_are_traced_to_all_that_they_took_along() -> None:
    found = _origins(ir.from_proto(_convolutions()))
    assert found[("/b0/act/Clip", "/b0/conv/Conv")] == "Conv"
    assert found[("/b1/act/Clip", "/b1/conv/Conv")] == "Conv"
    assert found[("/b2/Add", "/b2/act/Relu", "/b2/conv/Conv")] == "Conv"
    assert found[("/head/Gemm",)] == "Gemm"


def test_integer_convolutions_are_traced_through_their_grids() -> None:
    artifact = compile(
        ir.from_proto(_convolutions()),
        calibration=[_IMAGE],
        pipeline="canonicalize,quantize-activations",
        tolerance=_ANY,
    )
    found = _origins(artifact.model)
    by_operator = {operator: names for names, operator in found.items()}
    assert "/b2/Add" in by_operator["QLinearAdd"]
    assert any("/b0/act/Clip" in names for names, operator in found.items() if operator == "QLinearConv")


def test_every_node_of_a_model_is_in_one_kernel_at_most() -> None:
    model = ir.from_proto(encoder(layers=2))
    name_all(model, Findings())
    kernels = match_kernels(model, optimized_graph(model, Target.cpu()))
    nodes = [node for kernel in kernels for node in kernel.nodes]
    assert len(nodes) == len(set(nodes)) == len(list(model.graph))


# --- profiles ---


def _assert_adds_up(found: Profile) -> None:
    before = sum(row.before.microseconds for row in found.rows if row.before is not None)
    assert before == pytest.approx(found.before.kernels_us)
    assert before == pytest.approx(sum(item.microseconds for item in found.before.operators))
    assert found.before.attributed >= 0.95
    if found.after is not None:
        after = sum(row.after.microseconds for row in found.rows if row.after is not None)
        assert after == pytest.approx(found.after.kernels_us)
        assert found.after.attributed >= 0.95
    names = [row.layers for row in found.rows]
    assert len(names) == len(set(names))


def _row(found: Profile, layer: str) -> ProfileRow:
    (row,) = [row for row in found.rows if layer in row.layers]
    return row


def _operators(time: RowTime | None) -> set[str]:
    assert time is not None
    return {item.operator for item in time.operators}


def test_one_model() -> None:
    found = profile(ir.from_proto(mlp()), feeds={"x": samples()}, runs=3)
    _assert_adds_up(found)
    assert found.after is None
    assert found.verdict(found.rows[0]) == ""
    assert _row(found, "encoder.down").after is None
    assert _row(found, "encoder.down").ratio is None


def test_rows_of_two_models_meet() -> None:
    artifact = compile(mlp(), pipeline="quantize-weights", tolerance=_ANY)
    found = profile(ir.from_proto(mlp()), artifact.model, feeds={"x": samples()}, runs=3)
    _assert_adds_up(found)
    row = _row(found, "encoder.down")
    assert _operators(row.before) & {"MatMul", "Gemm", "FusedGemm"}
    assert _operators(row.after) == {"MatMulNBits"}
    assert row.after is not None
    assert row.after.low_bit
    assert "MatMulNBits" in found.verdict(row)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_bias_that_one_model_takes_along_shares_the_row(swapped: bool) -> None:
    pair = [ir.from_proto(encoder(layers=1)), _encoder_int8()]
    found = profile(*(reversed(pair) if swapped else pair), feeds=token_batches(1)[0], runs=2)
    _assert_adds_up(found)
    for part in ("query", "key", "value"):
        row = _row(found, f"encoder.layer.0.attention.self.{part}")
        assert row.layers == (f"encoder.layer.0.attention.self.{part}",)
        assert row.before is not None
        assert row.after is not None
    # the float model adds this bias in the norm's kernel, the other one in that of the product
    dense, norm = (_row(found, f"encoder.layer.0.output.{part}") for part in ("dense", "LayerNorm"))
    assert dense == norm
    assert dense.before is not None
    assert dense.after is not None


def _encoder_int8() -> ir.Model:
    """Return it with attention written out, as the float model has it."""
    steps = str(presets.int8()).replace("fuse-attention,", "")
    return compile(encoder(layers=1), calibration=token_batches(3), pipeline=steps, tolerance=_ANY).model


def test_models_without_common_values_meet_by_layer() -> None:
    other = mlp()
    renamed = {"h": "h2", "hb": "hb2", "r": "r2"}
    for node in other.graph.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    found = profile(ir.from_proto(mlp()), ir.from_proto(other), feeds={"x": samples()}, runs=2)
    _assert_adds_up(found)
    assert all(row.before is not None and row.after is not None for row in found.rows)


def test_models_with_other_inputs_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="the second model takes other inputs than the first"):
        profile(ir.from_proto(mlp()), ir.from_proto(encoder(layers=1)), feeds={"x": samples()})
    with pytest.raises(ValueError, match="runs is 0"):
        profile(ir.from_proto(mlp()), feeds={"x": samples()}, runs=0)


# --- verdicts ---


def _time(low_bit: bool, **operators: float) -> RowTime:
    found = tuple(OperatorTime(name, 1, took) for name, took in operators.items())
    return RowTime(sum(operators.values()), found, low_bit)


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (
            _time(False, MatMul=210),
            _time(True, MatMulIntegerToFloat=100),
            "2.1x faster: MatMulIntegerToFloat",
        ),
        (
            _time(False, Conv=100),
            _time(False, Conv=90, DequantizeLinear=60),
            "1.5x slower: Conv + DequantizeLinear in float",
        ),
        (_time(False, Conv=100), _time(True, QLinearConv=150), "1.5x slower: QLinearConv"),
        (_time(False, Add=100), _time(False, Add=105), "as fast: Add"),
        (_time(False, Add=1), _time(False, Add=2), "as fast: Add"),  # a thousandth of the whole
        (_time(False, MatMul=100), _time(False, MatMul=200, Cast=1), "2.0x slower: MatMul"),
        (None, _time(False, QuantizeLinear=10), "new: QuantizeLinear"),
        (_time(False, Add=10), None, "no kernel of its own any more"),
    ],
)
def test_the_verdict_says_what_became_of_a_row(
    before: RowTime | None, after: RowTime | None, verdict: str
) -> None:
    whole = ModelTime(1000, 1100, 100, 1.0, 10, ())
    row = ProfileRow(("layer",), before, after)
    assert Profile((row,), whole, whole).verdict(row) == verdict
    assert Profile((row,), whole, None).verdict(row) == ""


# --- the command ---


def test_the_command_shows_one_model(run: Run) -> None:
    said = run("profile", "model.onnx", "--data", "data.npz", "--runs", 2).stdout
    for words in ("encoder.down", "all kernels", "outside kernels", "operator", "of a run"):
        assert words in said
    assert "synthetic" in run("profile", "model.onnx", "--runs", 2).stdout
    assert "more (--all)" in run("profile", "model.onnx", "--runs", 2, "--top", 1).stdout


def test_the_command_shows_two_models(run: Run) -> None:
    run("compile", "model.onnx", "-o", "out", "--pipeline", "quantize-weights")
    said = run("profile", "model.onnx", "out", "--data", "data.npz", "--runs", 2, "--all").stdout
    assert "before: model.onnx" in said
    assert "MatMulNBits" in said
    values = json.loads(run("profile", "model.onnx", "out", "--runs", 2, "--json").stdout)
    total = sum(row["after"]["microseconds"] for row in values["rows"] if row["after"])
    assert total == pytest.approx(values["after"]["kernels_us"])
    assert any("MatMulNBits" in (row["verdict"] or "") for row in values["rows"])


def test_the_command_refuses_bad_input(run: Run) -> None:
    saved(encoder(layers=1), Path("other.onnx"))
    assert_failed(run("profile", "absent.onnx", code=1), "no such file: absent.onnx")
    assert_failed(run("profile", "model.onnx", "other.onnx", code=1), "the second model takes other inputs")
    assert_failed(run("profile", "model.onnx", "--data", "absent.npz", code=1), "absent.npz")


# --- real models ---


def _shared(name: str) -> ir.Model:
    if not (_SHARED / name).is_file():
        pytest.skip(f"{_SHARED / name} is absent (set SPLITFOLD_SHARED)")
    return read_model(_SHARED / name)


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("resnet20_cifar10.onnx", "int8"),
        pytest.param("mcunet_imagenet.onnx", "int8", marks=pytest.mark.slow),
        pytest.param("stories260K.onnx", "int8-dynamic", marks=pytest.mark.slow),
    ],
)
def test_real_models_are_attributed_to_layers(name: str, preset: str) -> None:
    model = _shared(name)
    feeds: Mapping[str, Any] = synthetic_feeds(model)
    made = compile(model, calibration=[feeds], pipeline=presets.preset(preset), tolerance=_ANY)
    found = profile(model, made.model, feeds=feeds, runs=2)
    _assert_adds_up(found)
    assert sum(row.before is not None and row.after is not None for row in found.rows) > 0.9 * len(found.rows)


@pytest.mark.slow
def test_minilm_is_attributed_to_layers() -> None:
    from real_minilm import minilm, sentences

    model = minilm().clone()
    made = compile(model.clone(), calibration=sentences(), pipeline=presets.int8(), tolerance=_ANY)
    found = profile(model, made.model, feeds=sentences()[0], runs=3)
    _assert_adds_up(found)
    row = _row(found, "encoder.layer.3.intermediate.dense")
    assert _operators(row.before) == {"MatMul", "BiasGelu"}
    assert "MatMulIntegerToFloat" in _operators(row.after)
