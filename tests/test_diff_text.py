# SPDX-License-Identifier: Apache-2.0
"""How a difference is told: by layer, on the terminal, as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from command_line import Run, assert_failed
from diffing import CALIBRATION, compiled, parsed_model
from onnx import helper, numpy_helper
from small import WIDTH, initializer, mlp, model_of, saved

from splitfold.compiler import compile, presets
from splitfold.compiler.cli.diff_text import layer_texts
from splitfold.compiler.debug.diff.graph_diff import diff
from splitfold.compiler.debug.snapshots import Snapshots
from splitfold.passes.errors import SpecError
from splitfold.runtime.model_file import read_model


def test_layers_asked_for() -> None:
    found = diff(ir.from_proto(mlp()), compiled(mlp(), "canonicalize,quantize-dynamic"))
    assert {change.layer for change in found.only("encoder.*").layers} == {"encoder.up", "encoder.down"}
    assert {change.layer for change in found.only("encoder.up").layers} == {"encoder.up"}
    assert found.only("encoder.act").layers == ()
    with pytest.raises(SpecError, match=r"no layer matches 'encoder\.upp'\. Did you mean 'encoder\.up'\?"):
        found.only("encoder.upp")


def test_snapshots_against_each_other(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "s")
    compile(mlp(), pipeline=presets.int8(), calibration=CALIBRATION, observers=[snapshots])
    models = [read_model(file) for file in snapshots.models]
    records = [json.loads(file.read_text()) for file in sorted((tmp_path / "s").glob("*.json"))]
    for record, before, after in zip(records, models, models[1:], strict=False):
        found = diff(before, after)
        assert record["modified"] or found.equal
        assert found.equal or record["applied"]
    assert diff(models[0], models[-1]).to_json()["layers"] == diff(models[1], models[-1]).to_json()["layers"]


# --- as text and JSON ---


def _deep(seed: int) -> ir.Model:
    """Return a model of four blocks, whose weights are drawn from `seed`."""
    nodes, weights, at = [], [], "x"
    for block in range(4):
        nodes.append(
            helper.make_node("MatMul", [at, f"w{block}"], [f"h{block}"], f"/block.{block}/dense/MatMul")
        )
        weights.append(initializer(f"w{block}", WIDTH, WIDTH, seed=seed + block))
        at = f"h{block}"
    nodes.append(helper.make_node("MatMul", [at, "last"], ["y"], "/head/MatMul"))
    return ir.from_proto(model_of(nodes, [*weights, initializer("last", WIDTH, 8)]))


def test_equal_changes_are_told_once() -> None:
    found = diff(_deep(0), _deep(10))
    lines = [text.plain for text in layer_texts(found.layers, verbose=False)]
    assert len(lines) == 2
    assert lines[0] == "block.{0-3}.dense  (4 layers)"
    found_db = [change.moved.sqnr_db for group in found.layers for change in group.tensors if change.moved]
    assert f"SQNR {min(found_db):.1f} to {max(found_db):.1f} dB" in lines[1]
    told = [text.plain for text in layer_texts(found.layers, verbose=True)]
    assert [line for line in told if not line.startswith(" ")] == [
        f"block.{number}.dense" for number in range(4)
    ]
    assert all(f"w{number} float[32,32]" in "".join(told) for number in range(4))


def test_colours() -> None:
    found = diff(ir.from_proto(mlp()), compiled(mlp(), "canonicalize,quantize-dynamic"))
    styles = {text.plain.lstrip()[0]: str(text.style) for text in layer_texts(found.layers, verbose=False)}
    assert (styles["+"], styles["M"], styles["e"]) == ("green", "yellow", "bold")


def test_the_command(run: Run) -> None:
    run(
        "compile",
        "model.onnx",
        "-o",
        "out",
        "--pipeline",
        "quantize-weights{block=16}",
        "--snapshots",
        "steps",
    )
    said = run("diff", "model.onnx", "out").stdout
    assert "nodes       4 -> 4: 2 replaced, 0 added, 0 removed, 0 changed\n" in said
    assert "tensors     3 -> 7: 2 changed, 0 added, 0 removed\n" in said
    assert (
        "encoder.up\n  MatMul -> com.microsoft::MatMulNBits\n  weight float[32,64] -> uint8[64,2,8] (4 bits"
        in said
    )
    assert "\x1b" not in said
    assert run("diff", "steps/02-quantize-weights.onnx", "out").stdout.startswith("the models are equal")
    assert "encoder.down" not in run("diff", "model.onnx", "out", "--layer", "*.up").stdout
    assert run("diff", "model.onnx", "out", "--layer", "*act").stdout.endswith(
        "nothing is different in these layers\n"
    )
    assert "w1 float[32,64] -> w1_int4" in run("diff", "-v", "model.onnx", "out").stdout
    run("diff", "--exit-code", "model.onnx", "out", code=1)
    run("diff", "--exit-code", "model.onnx", "model.onnx")
    assert (
        "Did you mean 'encoder.up'?"
        in run("diff", "model.onnx", "out", "--layer", "encodr.up", code=2).stderr
    )
    assert_failed(run("diff", "model.onnx", "absent.onnx", code=1), "no such file: absent.onnx")


def test_json(run: Run) -> None:
    run("compile", "model.onnx", "-o", "out", "--pipeline", "quantize-dynamic")
    found = json.loads(run("diff", "--json", "model.onnx", "out").stdout)
    assert list(found) == ["before", "after", "format", "equal", "summary", "slots", "layers"]
    assert (found["before"], found["after"], found["format"], found["equal"]) == (
        "model.onnx",
        "out",
        1,
        False,
    )
    assert [layer["layer"] for layer in found["layers"]] == ["encoder.up", "encoder.down"]
    change = found["layers"][0]["tensors"][0]
    assert (change["kind"], change["role"], change["after"]["dtype"]) == ("retyped", "weight", "int8")
    assert change["moved"]["sqnr_db"] > 35
    same = json.loads(run("diff", "--json", "model.onnx", "model.onnx").stdout)
    assert (same["equal"], same["layers"], same["slots"]) == (True, [], [])


def test_infinity_is_valid_json(run: Run) -> None:
    turned = mlp()
    array = numpy_helper.to_array(turned.graph.initializer[2]).astype(np.float64)
    turned.graph.initializer[2].CopyFrom(numpy_helper.from_array(array, "w2"))  # the same numbers in float64
    saved(turned, Path("double.onnx"))
    text = run("diff", "--json", "model.onnx", "double.onnx").stdout
    moved = json.loads(text, parse_constant=pytest.fail)["layers"][0]["tensors"][0]["moved"]
    assert moved == {"max_abs": 0.0, "relative": 0.0, "sqnr_db": "inf", "rescaled": None}
    assert (
        "  weight float[64,8] -> double[64,8], equal values\n"
        in run("diff", "model.onnx", "double.onnx").stdout
    )


def test_unrelated_models() -> None:
    other = parsed_model("g (float[2, 3] a) => (float[2, 3] b) { t = Tanh (a)  b = Mul (t, t) }")
    found = diff(ir.from_proto(mlp()), other)
    assert (found.summary.nodes_removed, found.summary.nodes_added, found.summary.nodes_replaced) == (4, 2, 0)
    assert {(change.name, change.before is None) for change in found.slots if change.name != "ai.onnx"} == {
        ("x", False),
        ("y", False),
        ("a", True),
        ("b", True),
    }
