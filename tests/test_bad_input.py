# SPDX-License-Identifier: Apache-2.0
"""Whatever a user can get wrong: each is an error of its own type that names the thing and the cure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from small import WIDTH, initializer, mlp, model_of, npz, samples, saved

from splitfold.compiler import compile, presets
from splitfold.compiler.errors import CaptureError
from splitfold.compiler.recipe import read_recipe
from splitfold.passes.errors import SpecError
from splitfold.passes.pipeline import Pipeline
from splitfold.runtime.errors import ArtifactError, CalibrationError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(mlp(), tmp_path / "model.onnx")


# --- files ---


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no such file: .*absent\.onnx"):
        compile(tmp_path / "absent.onnx", pipeline="canonicalize")


@pytest.mark.parametrize(
    "content", [b"", b"hello, this is no model\n" * 40, b"\x89PNG\r\n\x1a\n" + bytes(200), b"{}"]
)
def test_not_onnx(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"other\.onnx .*not an ONNX model"):
        compile(path, pipeline="canonicalize")


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_truncated_onnx(tmp_path: Path, model: Path, share: float) -> None:
    whole = model.read_bytes()
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ArtifactError, match=r"cut\.onnx .*truncated"):
        compile(cut, pipeline="canonicalize")


def test_truncated_by_the_last_bytes(tmp_path: Path, model: Path) -> None:
    whole = model.read_bytes()
    for missing in range(1, 24):
        cut = tmp_path / "cut.onnx"
        cut.write_bytes(whole[:-missing])
        with pytest.raises(ArtifactError, match=r"cut\.onnx .*truncated"):
            compile(cut, pipeline="canonicalize")


def _external(tmp_path: Path) -> tuple[Path, Path]:
    path = tmp_path / "external.onnx"
    onnx.save(mlp(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path, tmp_path / "weights.bin"


def test_missing_external_data(tmp_path: Path) -> None:
    path, data = _external(tmp_path)
    data.unlink()
    with pytest.raises(ArtifactError, match=r"external data of 'w1' is missing: .*weights\.bin"):
        compile(path, pipeline="canonicalize")


def test_truncated_external_data(tmp_path: Path) -> None:
    path, data = _external(tmp_path)
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(
        ArtifactError, match=r"external data of 'w2' is truncated: .*weights\.bin ends before byte"
    ):
        compile(path, pipeline="canonicalize")


def test_external_data_outside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    path, data = _external(tmp_path / "inside")
    data.rename(tmp_path / data.name)
    data.symlink_to(tmp_path / data.name)
    with pytest.raises(ArtifactError, match=r"external data of 'w1' lies outside the model's folder, in .*"):
        compile(path, pipeline="canonicalize")


# --- the model ---


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(bad: float) -> None:
    proto = mlp()
    array = numpy_helper.to_array(proto.graph.initializer[2]).copy()
    array[3, 4] = bad
    proto.graph.initializer[2].CopyFrom(numpy_helper.from_array(array, "w2"))
    with pytest.raises(CaptureError, match=r"weight 'w2' holds NaN or infinity.*training"):
        compile(proto, pipeline="canonicalize")


def test_a_model_of_another_type() -> None:
    with pytest.raises(CaptureError, match=r"cannot compile a dict: pass an nn\.Module"):
        compile({"x": 1})


def _custom() -> onnx.ModelProto:
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], name="/up/MatMul"),
        helper.make_node("Swirl", ["h"], ["s"], name="/swirl/Swirl", domain="acme", strength=2.0),
        helper.make_node("Relu", ["s"], ["y"], name="/act/Relu"),
    ]
    return model_of(nodes, [initializer("w1", WIDTH, 8)], domains=["acme"])


def test_custom_operators_are_kept_and_named() -> None:
    artifact = compile(_custom(), pipeline="canonicalize,quantize-weights")
    kept = [node for node in artifact.model.graph if node.domain == "acme"]
    assert [node.op_type for node in kept] == ["Swirl"]
    assert kept[0].attributes["strength"].as_float() == 2.0
    skipped = [item for record in artifact.records for item in record.skipped]
    assert ("swirl", "custom operator acme::Swirl is kept: register its library") in skipped
    assert "acme::Swirl" in str(artifact.manifest["unverified"])


def _quantized() -> onnx.ModelProto:
    """Return a MatMul whose weight already stands in int8 behind a DequantizeLinear."""
    codes = np.random.default_rng(3).integers(-127, 128, (WIDTH, 8)).astype(np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["w"], name="/up/DequantizeLinear"),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="/up/MatMul"),
    ]
    weights = [
        numpy_helper.from_array(codes, "codes"),
        numpy_helper.from_array(np.float32(0.01), "scale"),
        numpy_helper.from_array(np.int8(0), "zero"),
    ]
    return model_of(nodes, weights)


@pytest.mark.parametrize("pipeline", ["quantize-weights", "quantize-dynamic", "quantize-activations"])
def test_an_already_quantized_model_is_left_as_it_is(pipeline: str) -> None:
    artifact = compile(_quantized(), pipeline=pipeline, calibration=[{"x": samples(8)}])
    record = next(found for found in artifact.records if found.text.startswith(pipeline))
    assert not record.modified
    assert ("up", "already quantized: left as it is") in record.skipped
    assert [node.op_type for node in artifact.model.graph] == ["DequantizeLinear", "MatMul"]


def test_a_module_that_cannot_be_traced_is_named() -> None:
    torch = pytest.importorskip("torch")

    class Inner(torch.nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x - 1

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4), Inner()])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    with pytest.raises(
        CaptureError, match=r"cannot trace module 'blocks\.1' \(line \d+ of test_bad_input\.py\): \w+"
    ):
        compile(Outer().eval(), (torch.ones(2, 4),), pipeline="canonicalize")


def test_a_module_in_training_mode() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(CaptureError, match=r"training mode: call \.eval\(\)"):
        compile(torch.nn.Linear(4, 4), (torch.ones(2, 4),), pipeline="canonicalize")


# --- pipelines, presets, recipes ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantise-weights", r"unknown pass 'quantise-weights'\. Did you mean 'quantize-weights'\?"),
        ("quantize-weights{bit=4}", r"quantize-weights has no option 'bit'\. Did you mean 'bits'\?"),
        ("quantize-weights{bits=four}", r"quantize-weights: option bits=four is not an integer"),
        ("quantize-weights{bits=5}", r"quantize-weights: bits is 5; it may be 2, 3, 4 or 8"),
        ("quantize-weights{form=qdp}", r"option form=qdp is not one of nbits, qdq, .*Did you mean 'qdq'\?"),
        ("quantize-weights{bits=4", r"unbalanced braces"),
        (
            "quantize-weights{exclude=[encoder.upp]}",
            r"no layer matches 'encoder\.upp'\. Did you mean 'encoder\.up'\?",
        ),
    ],
)
def test_pipeline_text(model: Path, text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        compile(model, pipeline=text)


def test_unknown_preset() -> None:
    with pytest.raises(SpecError, match=r"unknown preset 'int88'\. Did you mean 'int8'\? Known: exact, int8"):
        presets.preset("int88")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[[pass]]\nname = "quantize-weights"\nbits = "4"\n',
            r"pass\[0\] \(quantize-weights\): key 'bits' is the text",
        ),
        ('[[pass]]\nname = "quantize-weights"\nbits = 4.5\n', r"pass\[0\]: .*bits=4\.5 is not an integer"),
        (
            '[[pass]]\nname = "quantize-weights"\nsymmetric = 1\n',
            r"pass\[0\]: .*symmetric=1 is not true or false",
        ),
        ('[[pass]]\nname = "quantize-weights"\nonly = 3\n', r"pass\[0\]: .*only=3 is not a list of a text"),
        (
            '[[pass]]\nname = "quantize-weights"\nbitts = 4\n',
            r"pass\[0\]: .*no option 'bitts'\. Did you mean 'bits'",
        ),
        ('[[pass]]\nname = "canonicalise"\n', r"pass\[0\]: unknown pass .*Did you mean 'canonicalize'"),
        ("[[pass]]\nbits = 4\n", r"pass\[0\]: key 'name' is missing"),
        ("[[pass]]\nname = 4\n", r"pass\[0\]: key 'name' is 4, not a text"),
        ('pass = "canonicalize"\n', r"'pass' must be an array of tables: write \[\[pass\]\]"),
        ("preset = 8\n", r"key 'preset' is 8, not a text"),
        ('preset = "int9"\n', r"key 'preset': unknown preset 'int9'\. Did you mean 'int8'"),
        ('presett = "int8"\n', r"unknown key 'presett'\. Did you mean 'preset'"),
        ("", r"it holds neither"),
        ('preset = "int8"\n[[pass]]\nname = "canonicalize"\n', r"it holds both"),
        ("preset = \n", r"is not TOML"),
    ],
)
def test_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(SpecError, match=message) as caught:
        read_recipe(path)
    assert "recipe.toml" in str(caught.value)


def test_recipes_that_are_right(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        '[[pass]]\nname = "canonicalize"\n'
        '[[pass]]\nname = "quantize-weights"\nbits = 8\nexclude = ["head", "*.up"]\n'
    )
    assert read_recipe(path) == Pipeline.parse("canonicalize,quantize-weights{bits=8,exclude=[head,*.up]}")
    path.write_text('preset = "int4"\n')
    assert read_recipe(path) == presets.int4()


# --- calibration ---


def _spoilt(bad: float) -> np.ndarray:
    array = samples(8)
    array[5, 6] = bad
    return array


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], r"calibration data is empty: at least one batch"),
        (lambda: iter(()), r"calibration data is empty: at least one batch"),
        ([{"xx": samples(4)}], r"calibration batch 0 hold 'xx', which is not an input .*Did you mean 'x'\?"),
        ([{}], r"calibration batch 0 lack the input 'x'"),
        ([{"x": samples(4)[:, :5]}], r"calibration batch 0: 'x' has shape \[4, 5\], the model expects .*32"),
        ([{"x": samples(4)[0]}], r"calibration batch 0: 'x' has shape \[32\]"),
        ([{"x": samples(4).astype(np.float64)}], r"'x' is float64, the model expects float32"),
        ([{"x": samples(4)}, {"x": _spoilt(np.nan)}], r"calibration batch 1: 'x' holds NaN"),
        (iter([{"x": samples(4)}]), r"one-shot iterator.*pass the generator function itself, or a list"),
        (({"x": samples(4)} for _ in range(3)), r"one-shot iterator.*pass the generator function itself"),
        (17, r"calibration is a int: pass an iterable of feeds"),
        (lambda: 17, r"the calibration function returned a int"),
        (None, r"quantize-activations needs calibration data: .*--calibration"),
    ],
    ids=[
        *("empty", "empty-function", "name", "lacking", "shape", "rank", "dtype", "nan", "iterator"),
        *("generator", "number", "function-of-number", "none"),
    ],
)
def test_calibration(model: Path, source: object, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        compile(model, pipeline="canonicalize,quantize-activations", calibration=source)


@pytest.mark.parametrize(
    "source",
    [
        {"x": samples(4)},
        [{"x": samples(4)}, {"x": samples(2)}],
        [(samples(4), np.zeros(4)), (samples(4), np.zeros(4))],  # a label beside it, as data sets have
        [samples(4), samples(4)],
        lambda: ({"x": samples(4, seed=seed)} for seed in range(2)),
    ],
    ids=["mapping", "list", "tuples", "arrays", "function"],
)
def test_calibration_that_is_right(model: Path, source: object) -> None:
    artifact = compile(model, pipeline="quantize-activations", calibration=source)
    assert artifact.manifest["deviation"]["y"]["cosine"] > 0.99


def test_a_data_loader(model: Path) -> None:
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.from_numpy(samples(12)), torch.zeros(12))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    artifact = compile(model, pipeline="quantize-activations", calibration=loader)
    assert artifact.manifest["deviation"]["y"]["cosine"] > 0.99
    module = torch.nn.Linear(32, 8).eval()
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    artifact = compile(module, (torch.ones(4, 32),), pipeline="quantize-activations", calibration=loader)
    assert artifact.manifest["calibration"] is not None


def test_calibration_files(tmp_path: Path, model: Path) -> None:
    def failing(path: Path, message: str) -> None:
        with pytest.raises(CalibrationError, match=message):
            compile(model, pipeline="canonicalize,quantize-activations", calibration=path)

    failing(tmp_path / "absent.npz", r"no calibration file at .*absent\.npz")
    (tmp_path / "text.npz").write_text("no archive")
    failing(tmp_path / "text.npz", r"text\.npz is not an \.npz of arrays")
    whole = npz(tmp_path / "whole.npz", x=samples()).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:-40])
    failing(tmp_path / "cut.npz", r"cut\.npz is not an \.npz of arrays")
    failing(npz(tmp_path / "none.npz", x=samples(0)), r"none\.npz holds no sample")
    failing(npz(tmp_path / "uneven.npz", x=samples(4), y=samples(3)), r"uneven\.npz: first axes differ")
    (tmp_path / "folder").mkdir()
    failing(tmp_path / "folder", r"folder .* holds no \.npz file")


def test_calibration_is_checked_also_where_no_pass_uses_it(model: Path) -> None:
    with pytest.raises(CalibrationError, match="'xx', which is not an input"):
        compile(model, {"x": samples(2)}, pipeline="canonicalize", calibration=[{"xx": samples(4)}])


def test_too_few_samples_for_a_fixed_batch(tmp_path: Path) -> None:
    fixed = saved(mlp(batch=8), tmp_path / "fixed.onnx")
    with pytest.raises(CalibrationError, match=r"'x' has shape \[3, 32\], the model expects \[8,"):
        compile(fixed, pipeline="quantize-activations", calibration=npz(tmp_path / "few.npz", x=samples(3)))


def test_an_npz_is_cut_to_a_fixed_batch(tmp_path: Path) -> None:
    fixed = saved(mlp(batch=8), tmp_path / "fixed.onnx")
    data = npz(tmp_path / "data.npz", x=samples(20))
    artifact = compile(fixed, pipeline="quantize-activations", calibration=data)
    assert artifact.manifest["feeds_synthetic"] is False


# --- example inputs ---


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((samples(2), samples(2)), r"2 example inputs, the model has 1: x"),
        (
            {"xx": samples(2)},
            r"the example inputs hold 'xx', which is not an input of the model\. Did you mean 'x'\?",
        ),
        ({}, r"the example inputs lack the input 'x'"),
        ((samples(2)[:, :5],), r"the example inputs: 'x' has shape \[2, 5\], the model expects .*32"),
        ((samples(2).astype(np.int64),), r"the example inputs: 'x' is int64, the model expects float32"),
        ((_spoilt(np.nan),), r"the example inputs: 'x' holds NaN"),
    ],
    ids=["count", "name", "lacking", "shape", "dtype", "nan"],
)
def test_example_inputs(model: Path, inputs: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile(model, inputs, pipeline="canonicalize")


def test_example_inputs_of_a_module() -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(9, 2)).eval()
    with pytest.raises(CaptureError, match=r"cannot trace module '2' .*\[2, 8\] X \[9, 2\]"):
        compile(module, (torch.ones(2, 4),), pipeline="canonicalize")
    with pytest.raises(CaptureError, match=r"needs example_inputs: a tuple, a dict"):
        compile(module, pipeline="canonicalize")
