# SPDX-License-Identifier: Apache-2.0
"""Failures leave a small folder that shows them, and the error names it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import planted
import pytest
from command_line import Run, assert_failed
from encoder import encoder, token_batches
from failing import LAYER, count, failed, named_folder
from random_graphs import random_model
from small import mlp, samples

from splitfold.compiler import Budget, Pipeline, Tolerance, compile
from splitfold.compiler.debug.reproduce import reduce as reduction
from splitfold.compiler.debug.reproduce.case import Case
from splitfold.compiler.debug.reproduce.case_folder import case_facts, read_case, read_facts, write_case
from splitfold.compiler.debug.reproduce.rerun import Outcome, reproduce
from splitfold.compiler.errors import BudgetError, OriginalFailedError, VerificationError
from splitfold.compiler.realisation import Unrealised
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.errors import PassFailedError, SpecError
from splitfold.runtime.errors import ArtifactError, CalibrationError, SessionError
from splitfold.runtime.feeds import synthetic_feeds
from splitfold.runtime.target import Target


def script(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "repro.py")]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")


def test_the_folder_shows_the_failure(tmp_path: Path) -> None:
    error, folder = failed(planted.ScaleWeight(layer=LAYER), place=tmp_path / "failures")
    assert folder.parent == tmp_path / "failures"
    assert sorted(file.name for file in folder.iterdir()) == [
        "failure.json", "inputs.npz", "model.onnx", "pipeline.txt", "repro.py",
    ]  # fmt: skip
    assert count(folder) == 1
    onnx.checker.check_model(folder / "model.onnx")
    facts = json.loads((folder / "failure.json").read_text())
    assert (facts["error"], facts["kind"], facts["layer"]) == ("PassFailedError", "moved", LAYER)
    assert facts["pass"] == f"plant-scale{{layer={LAYER}}}"
    assert facts["versions"]["onnxruntime"]
    assert facts["message"] in str(error)
    assert facts["notes"][0].startswith("1 of ")
    assert "all weights are random numbers in place of the model's" in facts["notes"]
    (weight,) = onnx.load(folder / "model.onnx").graph.initializer
    ours = {tuple(onnx.numpy_helper.to_array(item).ravel()) for item in encoder(layers=2).graph.initializer}
    assert tuple(onnx.numpy_helper.to_array(weight).ravel()) not in ours


def test_the_script_fails_until_it_is_mended(tmp_path: Path) -> None:
    _, folder = failed(planted.ScaleWeight(layer=LAYER), place=tmp_path)
    done = script(folder)
    assert done.returncode == 1
    assert "PassFailedError: pass plant-scale" in done.stderr
    assert "Traceback" not in done.stderr
    assert len((folder / "repro.py").read_text().splitlines()) < 25
    (folder / "pipeline.txt").write_text("canonicalize")
    assert script(folder).returncode == 0


def test_reproduce_tells_the_same_from_another_failure(tmp_path: Path) -> None:
    _, folder = failed(planted.ScaleWeight(layer=LAYER), place=tmp_path)
    found = reproduce(folder)
    assert (found.outcome, found.nodes, found.versions) == (Outcome.SAME, 1, ())
    assert isinstance(found.error, PassFailedError)
    assert not found.error.reproducer
    (folder / "pipeline.txt").write_text(f"plant-scale{{layer={LAYER},require=all}}")
    assert reproduce(folder).outcome is Outcome.OTHER
    (folder / "pipeline.txt").write_text("plant-scale{layer=elsewhere}")
    gone = reproduce(folder)
    assert (gone.outcome, gone.error) == (Outcome.GONE, None)


def test_the_same_failure_takes_the_place_of_the_last(tmp_path: Path) -> None:
    _, first = failed(planted.ScaleWeight(layer=LAYER), place=tmp_path)
    (first / "stale.txt").write_text("old")
    _, second = failed(planted.ScaleWeight(layer=LAYER), place=tmp_path)
    assert first == second
    assert not (first / "stale.txt").exists()
    _, other = failed(planted.ScaleWeight(layer=LAYER.replace("1", "0")), place=tmp_path)
    assert other != first
    assert {folder.name for folder in tmp_path.iterdir()} == {first.name, other.name}


def test_none_is_for_none(tmp_path: Path, reproducers: Path) -> None:
    with pytest.raises(PassFailedError) as caught:
        compile(
            encoder(layers=1),
            token_batches()[0],
            pipeline=Pipeline.of(planted.ScaleWeight(layer=LAYER.replace("1", "0"))),
            reproducers=None,
        )
    assert "eproducer" not in str(caught.value)


def test_what_the_user_got_wrong_writes_none(tmp_path: Path) -> None:
    def check(error: type[Exception], pipeline: str, **options: object) -> None:
        with pytest.raises(error) as caught:
            compile(mlp(), {"x": samples(4)}, pipeline=pipeline, reproducers=tmp_path / "none", **options)
        assert "eproducer" not in str(caught.value)
        assert not (tmp_path / "none").exists()

    check(CalibrationError, "quantize-activations")
    check(SpecError, "quantize-dynamic{exclude=[nothing]}")
    check(PassFailedError, "quantize-embeddings{require=some}")
    check(BudgetError, "canonicalize", budget=Budget(megabytes=1e-6))
    check(VerificationError, "canonicalize", evaluate=lambda _: float("nan"))


def test_calibration_data_goes_along_where_the_pass_needs_it(tmp_path: Path) -> None:
    _, folder = failed(
        "quantize-activations{min-sqnr=0}",
        place=tmp_path,
        calibration=token_batches(3),
        tolerance=Tolerance(cosine=0.999999),
    )
    assert count(folder) <= 2
    assert [file.name for file in folder.glob("calibration-*.npz")] == ["calibration-00.npz"]
    assert "Tolerance(cosine=0.999999)" in (folder / "repro.py").read_text()
    assert script(folder).returncode == 1
    assert reproduce(folder).outcome is Outcome.SAME


def test_passes_that_are_not_needed_are_left_out(tmp_path: Path) -> None:
    pipeline = Pipeline.parse("unfuse-norms,quantize-weights{bits=2},quantize-embeddings")
    with pytest.raises(VerificationError) as caught:
        compile(
            encoder(layers=2),
            token_batches()[0],
            pipeline=pipeline,
            tolerance=Tolerance(cosine=0.999),
            reproducers=tmp_path,
        )
    folder = named_folder(caught.value)
    assert (folder / "pipeline.txt").read_text() == "quantize-weights{bits=2}\n"
    assert count(folder) == 1


def test_a_model_that_does_not_run_itself_is_reduced_too(tmp_path: Path) -> None:
    bad = {"ids": np.full((2, 3), 10**6)}
    with pytest.raises(SessionError, match=r"the original model does not run: .*out of data") as caught:
        compile(encoder(layers=2), bad, pipeline="quantize-weights", reproducers=tmp_path)
    folder = named_folder(caught.value)
    assert isinstance(caught.value, OriginalFailedError)
    assert caught.value.layer == "embeddings.word_embeddings"
    assert count(folder) == 1
    assert script(folder).returncode == 1


def test_a_model_that_cannot_be_verified_is_reduced_too(tmp_path: Path) -> None:
    model = mlp()
    model.graph.node[2].op_type, model.graph.node[2].domain = "Mystery", "my.domain"
    model.opset_import.append(onnx.helper.make_opsetid("my.domain", 1))
    step = planted.Silent(layer="encoder.down")
    error, folder = failed(step, model=model, place=tmp_path, example_inputs=None)
    assert error.layer == "encoder.down"
    assert [node.op_type for node in onnx.load(folder / "model.onnx").graph.node] == ["Mystery", "MatMul"]
    assert not (folder / "inputs.npz").exists()
    assert reproduce(folder).outcome is Outcome.SAME


def test_a_layer_in_a_subgraph_is_found(tmp_path: Path) -> None:
    model = random_model(36)
    inside = [node for graph in model.graphs() for node in graph if graph is not model.graph]
    (layer,) = [node.name or "" for node in inside if node.op_type == "MatMul"]
    step = planted.Silent(layer=layer, everywhere=True)
    error, folder = failed(step, model=model, place=tmp_path, example_inputs=synthetic_feeds(model))
    assert error.layer == layer
    assert [node.op_type for node in onnx.load(folder / "model.onnx").graph.node] == ["If"]


def test_a_layer_that_could_not_be_named_is_found_by_reducing(tmp_path: Path) -> None:
    error, folder = failed(planted.Hidden(layer=LAYER), place=tmp_path)
    assert count(folder) == 2
    assert error.layer == ""
    assert (
        f"The smallest part that fails holds the layers {LAYER.replace('output', 'intermediate')}, {LAYER}."
        in str(error)
    )


def test_a_pass_that_cannot_be_imported_is_said(tmp_path: Path) -> None:
    class Local(planted.ScaleWeight):
        name = "plant-local"

    error, folder = failed(Local(layer=LAYER), place=tmp_path)
    said = "the pass 'plant-local' is defined inside a function"
    assert f"It cannot be run as it is: {said}" in str(error)
    assert any(said in note for note in read_facts(folder)["notes"])
    assert count(folder) == 1
    with pytest.raises(ArtifactError, match=r"Local cannot be imported"):
        reproduce(folder)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PassFailedError) as caught:
        compile(
            encoder(layers=2),
            token_batches()[0],
            pipeline=Pipeline.of(planted.ScaleWeight(layer=LAYER)),
            reproducers=tmp_path / "file",
        )
    assert caught.value.layer == LAYER
    assert "No reproducer was written: cannot write to" in str(caught.value)


def test_a_reduction_that_breaks_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: Case) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(reduction, "attempt", broken)
    with pytest.raises(PassFailedError, match="plant-scale") as caught:
        compile(
            encoder(layers=2),
            token_batches()[0],
            pipeline=Pipeline.of(planted.ScaleWeight(layer=LAYER)),
            reproducers=tmp_path,
        )
    folder = Path(re.search(r"Reproducer: (\S+) \(\d+ nodes, not reduced\)", str(caught.value))[1])  # type: ignore[index]
    assert count(folder) > 50
    assert script(folder).returncode == 1


def test_an_interrupt_passes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(case: Case) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reduction, "attempt", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compile(
            encoder(layers=2),
            token_batches()[0],
            pipeline=Pipeline.of(planted.ScaleWeight(layer=LAYER)),
            reproducers=tmp_path,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_plan_goes_along(tmp_path: Path) -> None:
    """A searched plan lies in a folder for temporary files, which is gone when the failure is looked at."""
    plan = tmp_path / "plan.toml"
    names = ("encoder.up", "encoder.down")
    rows = ", ".join(f'{{ name = "{name}", precision = "w2" }}' for name in names)
    plan.write_text(f"layers = [{rows}]")
    with pytest.raises(VerificationError) as caught:
        compile(
            mlp(),
            pipeline=f"assign-precision{{plan={plan}}}",
            calibration=[{"x": samples()}],
            tolerance=Tolerance(cosine=0.99999),
            reproducers=tmp_path / "failures",
        )
    plan.unlink()
    folder = named_folder(caught.value)
    assert reproduce(folder).outcome is Outcome.SAME
    done = script(folder)
    assert done.returncode == 1
    assert "VerificationError" in done.stderr


def test_files_hold_arrays_of_any_name(tmp_path: Path) -> None:
    feeds = {
        "/a/b:0": np.arange(3, dtype=np.int64),
        "file": np.float32(2).reshape(()),
        "two words": np.array([True]),
        "text": np.array(["one", "two"], object),
    }
    steps = Pipeline.of(CanonicalizePass())
    model = ir.from_proto(mlp())
    case = Case(model, feeds, (), steps, Target.cpu(), Tolerance(), Unrealised.KEEP)
    write_case(tmp_path, case)
    again = read_case(tmp_path, case_facts(case)).feeds
    assert again is not None
    assert list(again) == list(feeds)
    for name, array in feeds.items():
        np.testing.assert_array_equal(again[name], array)


def test_damaged_folders_are_said(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is no folder"):
        reproduce(tmp_path / "absent")
    with pytest.raises(ArtifactError, match=r"is no reproducer: it has no failure\.json"):
        reproduce(tmp_path)
    (tmp_path / "failure.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        reproduce(tmp_path)
    (tmp_path / "failure.json").write_text('{"format": 1}')
    with pytest.raises(ArtifactError, match="is not of format 1"):
        reproduce(tmp_path)
    _, folder = failed(planted.ScaleWeight(layer=LAYER), place=tmp_path / "failures")
    (folder / "inputs.npz").write_bytes(b"half")
    with pytest.raises(ArtifactError, match="is damaged"):
        reproduce(folder)
    (folder / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match="no such file"):
        reproduce(folder)


def test_command_line(run: Run, reproducers: Path) -> None:
    arguments = ("opt", "model.onnx", "-o", "o.onnx", "--pipeline", "quantize-weights{bits=2}")
    limits = ("--tolerance", "cosine=0.99999")
    result = run(*arguments, *limits, "--reproducers", "failures", code=1)
    assert_failed(result, "verification error", "Reproducer: failures/splitfold-", "splitfold reproduce")
    (folder,) = Path("failures").iterdir()
    again = run("reproduce", folder, code=1)
    assert "STILL FAILS, in the same way" in again.stdout
    assert "1 node" in again.stdout
    (folder / "pipeline.txt").write_text("canonicalize")
    assert "does not fail any more" in run("reproduce", folder).stdout
    facts = json.loads((folder / "failure.json").read_text())
    facts["versions"]["numpy"] = "0.1"
    (folder / "failure.json").write_text(json.dumps(facts))
    assert "numpy was 0.1, is " in run("reproduce", folder).stdout

    before = set(reproducers.iterdir()) if reproducers.exists() else set()
    quiet = run(*arguments, *limits, "--no-reproducer", code=1)
    assert "eproducer" not in quiet.stderr
    run("compile", "model.onnx", "-o", "out", "--pipeline", "quantize-weights{bits=2}", *limits, code=1)
    assert len(set(reproducers.iterdir()) - before) == 1
    run(*arguments, "--no-reproducer", "--reproducers", "failures", code=2)
    assert_failed(run("reproduce", "nowhere", code=1), "artifact error", "nowhere is no folder")
