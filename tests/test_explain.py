# SPDX-License-Identifier: Apache-2.0
"""Explain: every node has an answer, and what is said of a layer is what stands in the file."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from command_line import Run, assert_failed
from encoder import encoder, token_batches
from onnx import helper
from random_graphs import random_model
from small import WIDTH, initializer, mlp, model_of, samples

from splitfold.compiler import Tolerance, compile, presets
from splitfold.compiler.debug.drift.measurement import drift
from splitfold.compiler.debug.explain.explanation import Explanation, LayerExplanation, explain
from splitfold.compiler.debug.explain.layer_steps import Action
from splitfold.compiler.inspection import constant_bytes
from splitfold.compiler.presets import PRESETS
from splitfold.passes.affine import unpack_codes
from splitfold.passes.errors import SpecError
from splitfold.runtime.artifact import Artifact

_ANY = Tolerance(cosine=None)


@functools.cache
def _encoder(preset: str, without: str = "fuse-attention") -> Artifact:
    steps = str(PRESETS[preset]()).replace(f",{without}", "")
    return compile(encoder(layers=2), calibration=token_batches(3), pipeline=steps, tolerance=_ANY)


def _mlp(pipeline: str, **options: object) -> Artifact:
    return compile(mlp(), calibration=[{"x": samples()}], pipeline=pipeline, tolerance=_ANY, **options)  # type: ignore[arg-type]


def _one(explanation: Explanation, pattern: str) -> LayerExplanation:
    (found,) = explanation.find(pattern)
    return found


def _assert_all_answered(artifact: Artifact) -> None:
    """Every node is a low-bit weight's reader, or has a reason; and it is found by its name."""
    explanation = explain(artifact)
    low_bit = {weight.node for item in explanation.layers for weight in item.weights if weight.low_bit}
    for graph in artifact.model.graphs():
        for node in graph:
            answers = [
                note.reason.why or item.reason
                for item in explanation.find(node.name or "")
                for note in item.notes
                if node.name in note.nodes
            ]
            assert node in low_bit or all(answers), node
            assert node in low_bit or answers, node
    for item in explanation.layers:
        assert item.low_bit != bool(item.reason), item.name


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_node_has_an_answer(preset: str) -> None:
    _assert_all_answered(_encoder(preset))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("preset", ["int8-dynamic", "int4"])
def test_every_node_of_random_models_has_an_answer(preset: str, seed: int) -> None:
    _assert_all_answered(compile(random_model(seed), pipeline=PRESETS[preset](), tolerance=_ANY))


# --- bits and grids ---


def test_bits_are_what_is_stored_padding_included() -> None:
    model = model_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="/head/MatMul")], [initializer("w", WIDTH, 8)]
    )
    artifact = compile(model, pipeline="quantize-weights{bits=4,block=64}", tolerance=_ANY)
    (weight,) = _one(explain(artifact), "head").weights
    assert weight.elements == WIDTH * 8
    assert weight.codes == 8 * 64 // 2  # each column is padded from 32 rows to a block of 64
    assert weight.padding == 8 * 32 // 2
    assert weight.scales == 8 * 4
    assert weight.zero_points == 8  # one 4-bit zero point a column, in a byte of its own
    assert weight.bits == 8 * (256 + 32 + 8) / 256
    assert weight.block == 64
    held = artifact.model.graph.initializers[weight.weight].const_value
    assert held is not None
    assert held.nbytes == weight.codes


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_parts_add_up_to_all_constants(preset: str) -> None:
    artifact = _encoder(preset)
    totals = explain(artifact).totals
    parts = totals.codes + totals.scales + totals.zero_points + totals.bias + totals.other
    assert parts == constant_bytes(artifact.model)
    assert totals.elements == 50 * 16 + 2 * (4 * 16 * 16 + 2 * 16 * 32)


def test_the_static_grid_is_that_of_the_file() -> None:
    artifact = _mlp("quantize-activations{form=qdq}")
    layer = _one(explain(artifact), "encoder.up")
    (weight,) = layer.weights
    assert weight.activation is not None
    constants = {
        name: value.const_value.numpy()
        for name, value in artifact.model.graph.initializers.items()
        if value.const_value is not None
    }
    assert weight.activation.scale == pytest.approx(float(constants["x_scale"]))
    assert weight.activation.zero_point == int(constants["x_zero_point"])
    assert weight.scale_range == pytest.approx(
        (float(constants["w1_scale"].min()), float(constants["w1_scale"].max()))
    )
    assert weight.scale_count == 64
    assert weight.bias == 64 * 4
    assert layer.precision == "int8, activations static"
    assert layer.kernel == artifact.manifest["realised"]["encoder.up"]["kernel"] != ""


def test_scales_of_dynamic_weights_and_of_tables_are_found() -> None:
    explanation = explain(_encoder("int8-dynamic"))
    (weight,) = _one(explanation, "encoder.layer.0.intermediate.dense").weights
    assert (weight.scales, weight.zero_points, weight.activation) == (32 * 4, 32, None)
    artifact = compile(
        encoder(layers=1), pipeline="quantize-embeddings{min-bytes=1}", example_inputs=token_batches(1)[0]
    )
    (table,) = _one(explain(artifact), "embeddings.word_embeddings").weights
    assert (table.codes, table.scales, table.bits) == (50 * 16, 50 * 4, 8 * (1 + 4 / 16))


def test_packed_tables_count_every_code() -> None:
    pipeline = "quantize-embeddings{bits=4,block=16,min-bytes=1}"
    artifact = compile(encoder(layers=1), pipeline=pipeline, example_inputs=token_batches(1)[0])
    (weight,) = _one(explain(artifact), "embeddings.word_embeddings").weights
    held = artifact.model.graph.initializers[weight.weight].const_value
    assert held is not None
    assert unpack_codes(held.numpy(), 4, 16).size == weight.elements == 50 * 16
    assert weight.padding == 0


# --- reasons ---


def test_the_passes_say_why_in_their_order() -> None:
    artifact = _mlp("quantize-activations{min-sqnr=200,form=qdq},quantize-dynamic{exclude=[encoder.up]}")
    layer = _one(explain(artifact), "encoder.up")
    steps = [(step.name, step.action) for step in layer.steps]
    assert steps == [
        ("quantize-activations", Action.SKIPPED),
        ("quantize-dynamic", Action.SKIPPED),
        ("legalize", Action.NO_CANDIDATE),
    ]
    assert layer.reason.startswith("quantize-activations: its static int8 output has ")
    assert layer.reason.endswith("quantize-dynamic: excluded by option")
    assert layer.precision == "float"
    assert layer.bits == 32
    taken = _one(explain(artifact), "encoder.down")
    assert [step.action for step in taken.steps][:2] == [Action.SKIPPED, Action.APPLIED]
    assert taken.reason == ""


def test_measured_errors_are_recorded_for_taken_and_skipped_layers() -> None:
    artifact = _mlp("quantize-activations{min-sqnr=10,form=qdq,exclude=[encoder.up]}")
    (record,) = [r for r in artifact.manifest["records"] if r["text"].startswith("quantize-activations")]
    assert set(record["measured"]) == {"encoder.down"}
    assert record["measured"]["encoder.down"] == round(record["measured"]["encoder.down"], 2) > 10
    assert _one(explain(artifact), "encoder.down").local_db == record["measured"]["encoder.down"]
    skipped = _mlp("quantize-activations{min-sqnr=200,form=qdq}")
    (record,) = [r for r in skipped.manifest["records"] if r["text"].startswith("quantize-activations")]
    assert set(record["measured"]) == {"encoder.up", "encoder.down"}
    assert json.loads(json.dumps(dict(skipped.manifest))) == dict(skipped.manifest)


def test_drift_measures_what_no_pass_did() -> None:
    artifact = _mlp("quantize-weights")
    assert _one(explain(artifact), "encoder.up").local_db is None
    measured = explain(artifact, drift=drift(mlp(), artifact, [{"x": samples()}]))
    found = _one(measured, "encoder.up").local_db
    assert found is not None
    assert 10 < found < 60
    assert _one(measured, "encoder.act").local_db is None


def test_a_pipeline_that_quantizes_nothing_says_so() -> None:
    layer = _one(explain(_mlp("canonicalize")), "encoder.up")
    assert layer.reason == "the pipeline has no quantizing pass"


def test_a_layer_that_no_pass_takes_up_says_what_they_take_up() -> None:
    artifact = compile(
        encoder(layers=1), pipeline="quantize-weights", example_inputs=token_batches(1)[0], tolerance=_ANY
    )
    table = _one(explain(artifact), "embeddings.word_embeddings")
    assert table.reason == (
        "no quantizing pass took it up: quantize-weights takes up MatMul and Gemm with a constant weight"
    )


def test_nodes_without_weights_say_what_they_are() -> None:
    explanation = explain(_encoder("int8"))
    expected = {
        "encoder.layer.0.attention.self.mix": "MatMul: both operands are computed",
        "encoder.layer.0.attention.self.softmax": "Softmax: it has no weights",
        "encoder.layer.0.output.LayerNorm": "LayerNormalization: its 32 parameters",
        "encoder.layer.0.attention.self.join": "Transpose, Reshape: it only moves values",
    }
    for name, words in expected.items():
        layer = _one(explanation, name)
        assert layer.precision == "float"
        assert layer.reason.startswith(words), layer.reason
    fused = _one(explain(_encoder("int8", without="nothing")), "encoder.layer.0.attention.self.mix")
    assert fused.reason.startswith("Attention: it has no weights")


def test_a_layer_put_back_to_float_says_so() -> None:
    artifact = _encoder("exact")
    manifest = {**artifact.manifest, "put_back": {"encoder.layer.0.output.dense": "MatMul"}}
    layer = _one(explain(Artifact(artifact.model, manifest)), "encoder.layer.0.output.dense")
    assert layer.reason == (
        "put back to float: in low precision no low-bit kernel computed it, it ran as MatMul"
    )


def test_a_float_convolution_between_integer_layers_says_why() -> None:
    convolutions = [
        helper.make_node("Conv", [value, f"k{at}"], [f"h{at}"], name=f"/c{at}/Conv", kernel_shape=[1, 1])
        for at, value in enumerate(["image", "h0", "h1"])
    ]
    weights = [initializer(f"k{at}", 4, 4, 1, 1, seed=at) for at in range(3)]
    graph = helper.make_graph(
        convolutions,
        "stack",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [1, 4, 6, 6])],
        [helper.make_tensor_value_info("h2", onnx.TensorProto.FLOAT, [1, 4, 6, 6])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    batch = np.random.default_rng(0).standard_normal((1, 4, 6, 6)).astype(np.float32)
    artifact = compile(
        model, calibration=[{"image": batch}], pipeline="quantize-activations{exclude=[c1]}", tolerance=_ANY
    )
    layer = _one(explain(artifact), "c1")
    assert layer.operators["FusedConv"] == 1
    assert layer.reason == "quantize-activations: excluded by option"
    assert any("would quantize it by itself" in note.reason.why for note in layer.notes)
    assert _one(explain(artifact), "c0").low_bit


def test_fused_layers_are_found_by_each_of_their_names() -> None:
    names = ["gamma", "beta", "mean", "var"]
    vectors = [
        onnx.numpy_helper.from_array(
            np.abs(np.random.default_rng(at).standard_normal(8)).astype(np.float32), n
        )
        for at, n in enumerate(names)
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="/fc/MatMul"),
        helper.make_node("BatchNormalization", ["h", *names], ["y"], name="/bn/BatchNormalization"),
    ]
    artifact = compile(model_of(nodes, [initializer("w", WIDTH, 8), *vectors]), pipeline="quantize-weights")
    explanation = explain(artifact)
    assert explanation.find("fc") == explanation.find("bn")
    assert _one(explanation, "fc").low_bit


def test_unknown_layers_are_refused_with_a_near_name() -> None:
    explanation = explain(_encoder("int8"))
    with pytest.raises(SpecError, match=r"Did you mean 'encoder\.layer\.0\.output\.dense'"):
        explanation.find("encoder.layer.0.output.dens")
    assert len(explanation.find("encoder.layer.*.output.dense")) == 4


# --- patterns ---


def _norm(square: list[str]) -> ir.Model:
    make = helper.make_node
    nodes = [
        make(*square[:1], square[1:], ["s"], name="square"),  # type: ignore[arg-type]
        make("ReduceMean", ["s", "axes"], ["m"], name="mean"),
        make("Add", ["m", "eps"], ["e"], name="add"),
        make("Sqrt", ["e"], ["q"], name="sqrt"),
        make("Div", ["x", "q"], ["n"], name="div"),
        make("Mul", ["n", "g"], ["k"], name="scale"),
        make("MatMul", ["k", "w"], ["y"], name="/fc/MatMul"),
    ]
    constants = {"axes": np.array([-1]), "eps": np.float32(1e-5), "two": np.float32(2.0)}
    held = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    return ir.from_proto(
        model_of(nodes, [*held, initializer("g", WIDTH), initializer("w", WIDTH, 8)], opset=18)
    )


def test_a_nearly_fused_norm_names_what_is_in_the_way() -> None:
    near = explain(compile(_norm(["Mul", "x", "x"]), pipeline="quantize-weights"))
    (fit,) = _one(near, "mean").patterns
    assert str(fit).endswith("would fuse to SimplifiedLayerNormalization: expected Pow, got Mul at 'square'")
    assert _one(near, "square").patterns == (fit,)
    assert _one(near, "fc").patterns == ()


def test_a_norm_that_the_runtime_fuses_is_no_near_miss() -> None:
    fits = explain(compile(_norm(["Pow", "x", "two"]), pipeline="quantize-weights"))
    (fit,) = _one(fits, "mean").patterns
    assert fit.fused
    assert not fit.missing


# --- the command ---


def test_the_command_lists_all_layers(run: Run) -> None:
    run("compile", "model.onnx", "-o", "out", "--pipeline", "quantize-weights{exclude=[encoder.down]}")
    said = run("explain", "out").stdout
    assert "encoder.up" in said
    assert "MatMulNBits" in said
    assert "quantize-weights: excluded by option" in said
    assert "1 layers without weights (--all lists them)" in said
    assert "encoder.act" not in said
    assert "encoder.act" in run("explain", "out", "--all").stdout
    assert run("explain", "out/model.onnx").stdout == said


def test_the_command_explains_a_layer(run: Run) -> None:
    run("compile", "model.onnx", "-o", "out", "--calibration", "data.npz", "--preset", "int8")
    said = run("explain", "out", "encoder.up").stdout
    for words in ("int8, activations static", "bits a weight stored", "scales", "zero point", "dB SQNR"):
        assert words in said
    assert said.index("fold-scales") < said.index("quantize-activations") < said.index("quantize-dynamic")
    assert "Relu" in run("explain", "out", "encoder.act").stdout


def test_the_command_prints_json(run: Run) -> None:
    run("compile", "model.onnx", "-o", "out", "--pipeline", "quantize-weights")
    values = json.loads(run("explain", "out", "encoder.*", "--json").stdout)
    assert [layer["layers"] for layer in values["layers"]] == [
        ["encoder.up"],
        ["encoder.act"],
        ["encoder.down"],
    ]
    assert values["layers"][0]["weights"][0]["elements"] == WIDTH * 64
    measured = run("explain", "out", "--json", "--model", "model.onnx", "--data", "data.npz").stdout
    assert json.loads(measured)["layers"][0]["local_db"] > 10


def test_bad_input_is_refused_in_one_block(run: Run) -> None:
    run("compile", "model.onnx", "-o", "out", "--pipeline", "quantize-weights")
    assert_failed(run("explain", "out", "encoder.upp", code=2), "Did you mean 'encoder.up'?")
    assert_failed(run("explain", "model.onnx", code=1), "no readable manifest", "splitfold inspect")
    assert_failed(run("explain", "absent", code=1), "absent")
    assert Path("out").is_dir()


@pytest.mark.slow
def test_minilm() -> None:
    from real_minilm import minilm, sentences

    artifact = compile(minilm().clone(), calibration=sentences(), pipeline=presets.int8(), tolerance=_ANY)
    _assert_all_answered(artifact)
    layers = [item for item in explain(artifact).layers if item.weights]
    assert sum(item.low_bit for item in layers) >= 36
    assert all(
        item.local_db is not None for item in layers if item.low_bit and "Gather" not in item.operators
    )
