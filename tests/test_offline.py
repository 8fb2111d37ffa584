# SPDX-License-Identifier: Apache-2.0
"""An artifact after the runtime's own optimisation: the same outputs, all or nothing, and it says for which
machine."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from command_line import Run
from random_graphs import random_model
from seeded import feeds_for, parse_graph

from splitfold.compiler import compile
from splitfold.compiler.replay import replay
from splitfold.runtime import model_file, offline
from splitfold.runtime.artifact import Artifact
from splitfold.runtime.errors import ArtifactError, SessionError
from splitfold.runtime.feeds import synthetic_feeds
from splitfold.runtime.session import Session

CONV = (
    '<ir_version: 10, opset_import: ["" : 20]>\n'
    "net (float[b,4,8,8] x) => (float[b,8,6,6] y) <float[8,4,3,3] W = seeded, float[8] c = seeded> "
    "{ [conv] h = Conv(x, W, c) y = Relu(h) }"
)


def model() -> ir.Model:
    return ir.from_proto(parse_graph(CONV))


def compiled() -> Artifact:
    return compile(model(), pipeline="canonicalize", speed=None, reproducers=None)


def manifest_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return found


def test_the_optimised_graph_is_written(tmp_path: Path) -> None:
    artifact, feeds = compiled(), feeds_for(model())
    folder = artifact.save_optimized(tmp_path / "out")
    assert sorted(file.name for file in folder.iterdir()) == ["manifest.json", "model.onnx"]
    loaded = Artifact.load(folder)
    assert "Relu" not in {node.op_type for node in loaded.model.graph}  # fused with the convolution
    expected = artifact.session().run(feeds)["y"]
    np.testing.assert_array_equal(loaded.session().run(feeds)["y"], expected)
    bare = onnxruntime.InferenceSession(folder / "model.onnx").run(None, feeds)[0]
    np.testing.assert_array_equal(bare, expected)


@pytest.mark.parametrize("seed", range(8))
def test_random_models(tmp_path: Path, seed: int) -> None:
    start = random_model(seed)
    folder = Artifact(start, {}).save_optimized(tmp_path / "out")
    feeds = synthetic_feeds(start, seed=3)
    before, after = Session(start, threads=1).run(feeds), Session(folder / "model.onnx", threads=1).run(feeds)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


def test_the_manifest_says_for_what(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    artifact = compiled()
    folder = artifact.save_optimized(tmp_path / "out")
    facts = manifest_of(folder)["offline_optimized"]
    assert isinstance(facts, dict)
    assert facts["runtime"] == onnxruntime.__version__
    assert facts["processor"]
    assert "offline_optimized" not in artifact.manifest
    with caplog.at_level(logging.WARNING):
        Artifact.load(folder)
        assert not caplog.records
        manifest = {**manifest_of(folder), "offline_optimized": {**facts, "processor": "a 68000"}}
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        Artifact.load(folder)
    assert "processor a 68000, here" in caplog.text


def test_a_replay_compares_the_graph_before(tmp_path: Path) -> None:
    found = replay(compiled().save_optimized(tmp_path / "out"), model())
    assert found.same_model
    assert any("optimised offline" in warning for warning in found.warnings)


def test_weights_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = compiled()
    monkeypatch.setattr(model_file, "_EXTERNAL_ABOVE", 100)
    folder = artifact.save_optimized(tmp_path / "out")
    assert (folder / "model.onnx.data").stat().st_size >= 8 * 4 * 9 * 4
    feeds = feeds_for(model())
    np.testing.assert_array_equal(
        Artifact.load(folder).session().run(feeds)["y"], artifact.session().run(feeds)["y"]
    )


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = compiled()
    before = artifact.save(tmp_path / "out")
    was = manifest_of(before)

    def broken(*_: object) -> Path:
        raise SessionError("the runtime refuses it")

    monkeypatch.setattr(offline, "write_optimized", broken)
    with pytest.raises(SessionError, match="refuses"):
        artifact.save_optimized(tmp_path / "out", overwrite=True)
    assert manifest_of(before) == was
    with pytest.raises(SessionError, match="refuses"):
        artifact.save_optimized(tmp_path / "new")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_other_outputs_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = offline.write_optimized

    def scaled(given: ir.Model, *rest: object) -> Path:
        other = given.clone()
        weight = other.graph.initializers["W"]
        weight.const_value = ir.tensor(weight.const_value.numpy() * 2, name="W")  # type: ignore[union-attr]
        return real(other, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(offline, "write_optimized", scaled)
    with pytest.raises(ArtifactError, match="another 'y'"):
        compiled().save_optimized(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_full_folder_is_not_replaced(tmp_path: Path) -> None:
    artifact = compiled()
    artifact.save(tmp_path / "out")
    with pytest.raises(ArtifactError, match="not empty"):
        artifact.save_optimized(tmp_path / "out")


def test_command_line(tmp_path: Path, run: Run) -> None:
    ir.save(model(), tmp_path / "m.onnx")
    args = ["compile", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "out"), "--preset", "exact"]
    run(*args, "--if-slower", "off", "--offline-optimized")
    assert "offline, for" in " ".join(run("inspect", str(tmp_path / "out")).output.split())
