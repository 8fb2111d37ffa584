# SPDX-License-Identifier: Apache-2.0
"""``splitfold bisect``, and recipes that are written and read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import Run, assert_failed
from encoder import encoder, token_batches
from onnx import numpy_helper

from splitfold.compiler.presets import PRESETS
from splitfold.compiler.recipe import read_recipe, recipe_text
from splitfold.passes.pipeline import Pipeline

LAYER = "encoder.layer.2.output.dense"
WORKS = f"canonicalize,quantize-dynamic{{exclude=[{LAYER}]}}"
METRIC = """
import numpy as np

EXPECTED = np.load("expected.npy")


def cosine(session):
    found = session.run({"ids": np.load("ids.npy")})["y"]
    return (found * EXPECTED).sum() / np.linalg.norm(found) / np.linalg.norm(EXPECTED)


def broken(session):
    raise KeyError("labels.csv")


threshold = 0.9
"""


def outlier(layer: str) -> onnx.ModelProto:
    """Return an encoder in which one input channel of `layer` is far above the others."""
    model = encoder(seed=2)
    for weight in model.graph.initializer:
        array = np.array(numpy_helper.to_array(weight))
        if weight.name == layer.replace("output.dense", "intermediate.dense.bias"):
            array[3] += 3000
        elif weight.name == f"{layer}.weight":
            array[3] *= 1e-4
        weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    return model


@pytest.fixture
def metric(run: Run, request: pytest.FixtureRequest) -> str:
    """Write the planted model, data and a module of metrics, and return the module's name."""
    model, ids = outlier(LAYER), token_batches(1)[0]["ids"]
    onnx.save(model, "planted.onnx")
    np.savez("ids.npz", ids=ids)
    np.save("ids.npy", ids)
    run("opt", "planted.onnx", "-o", "copy.onnx")
    import onnxruntime

    expected = onnxruntime.InferenceSession("planted.onnx").run(None, {"ids": ids})[0]
    np.save("expected.npy", expected)
    name = f"metrics_{abs(hash(request.node.nodeid))}"
    Path(f"{name}.py").write_text(METRIC, encoding="utf-8")
    return name


def test_finds_writes_and_says_what_works(run: Run, metric: str) -> None:
    options = ("--pipeline", "canonicalize,quantize-dynamic", "--evaluate", f"{metric}:cosine")
    said = run("bisect", "planted.onnx", *options, "--drop", "0.01", "-o", "works.toml").stdout
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert "original 1" in lines
    assert any(line.startswith("quantize-dynamic 0.") and line.endswith("broken") for line in lines)
    assert "culprit quantize-dynamic" in lines
    assert any(line.startswith(LAYER) for line in lines)
    assert f"works {WORKS}" in lines
    assert any(line.startswith("evaluations 4 of at most 200") for line in lines)
    assert read_recipe("works.toml") == Pipeline.parse(WORKS)
    run("compile", "planted.onnx", "-o", "out", "--recipe", "works.toml", "--tolerance", "cosine=0.99")


def test_outputs_on_data(run: Run, metric: str) -> None:
    options = ("--pipeline", "quantize-dynamic", "--data", "ids.npz", "--tolerance", "cosine=0.99")
    result = run("bisect", "planted.onnx", *options, "-v", "--output", "works.txt")
    assert Path("works.txt").read_text(encoding="utf-8") == f"quantize-dynamic{{exclude=[{LAYER}]}}\n"
    assert "evaluation 1: the original model" in result.stderr
    assert f"quantize-dynamic leaves out {LAYER}" in result.stderr


def test_a_limit_that_is_reached_is_said(run: Run, metric: str) -> None:
    options = ("--data", "ids.npz", "--tolerance", "cosine=0.99", "--limit", "3")
    said = run("bisect", "planted.onnx", "--pipeline", "quantize-dynamic", *options, code=1).stdout
    assert "the limit of 3 evaluations ended the search" in said
    assert "not narrowed down to layers: the limit of evaluations was reached before" in said
    assert "no pipeline was found" in said
    said = run(
        "bisect", "planted.onnx", "--pipeline", "quantize-embeddings,quantize-dynamic", *options
    ).stdout
    assert "this is the best known" in said
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert lines[lines.index("left out quantize-dynamic") + 1] == "works quantize-embeddings"


def test_errors_of_the_metric(run: Run, metric: str) -> None:
    model = ("bisect", "planted.onnx", "--pipeline", "quantize-dynamic", "--evaluate")
    assert_failed(
        run(*model, f"{metric}:broken", code=1),
        "bisection error: evaluate raised KeyError for the original model: 'labels.csv'",
    )
    assert_failed(run(*model, f"{metric}:threshold", code=1), "names no function")
    assert_failed(run(*model, "cosine", code=1), "give package.module:function")
    assert_failed(run(*model, f"{metric}:cosin", code=1), "Did you mean 'cosine'?")
    assert_failed(
        run(*model, f"{metric}:cosine", "--drop", "0.9", code=1),
        "nothing to bisect: the whole pipeline meets the limit (1 before it, 0.",
    )
    assert_failed(
        run(*model, f"{metric}:cosine", "-o", "nowhere/works.txt", code=1), "no such folder: nowhere"
    )


def test_wrong_usage(run: Run) -> None:
    assert "give one of them" in run("bisect", "model.onnx", code=2).stderr
    both = run("bisect", "model.onnx", "--evaluate", "m:f", "--data", "data.npz", code=2)
    assert "give one of them" in both.stderr
    drop = run("bisect", "model.onnx", "--data", "data.npz", "--drop", "0.1", code=2)
    assert "goes with --evaluate" in drop.stderr
    tolerance = run("bisect", "model.onnx", "--evaluate", "m:f", "--tolerance", "cosine=0.9", code=2)
    assert "goes with --data" in tolerance.stderr


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_is_read_back(name: str, tmp_path: Path) -> None:
    _read_back(PRESETS[name](), tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        'quantize-weights{bits=4,block=32,only=["a b","c,d",e.*]},quantize-activations{percentile=99.9}',
        'quantize-activations{symmetric=true,calibrator=mse,only=["with \\"quotes\\"","back\\\\slash","ü"]}',
        "quantize-embeddings{min-bytes=0,require=some}",
    ],
)
def test_every_kind_of_option_is_read_back(text: str, tmp_path: Path) -> None:
    _read_back(Pipeline.parse(text), tmp_path)


def _read_back(pipeline: Pipeline, folder: Path) -> None:
    file = folder / "recipe.toml"
    file.write_text(recipe_text(pipeline), encoding="utf-8")
    assert read_recipe(file) == pipeline
