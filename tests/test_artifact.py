# SPDX-License-Identifier: Apache-2.0
"""Artifacts: round trip, deterministic bytes, all or nothing, digests, replay."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper
from small import mlp, npz, samples, saved

from splitfold.compiler import Artifact, Tolerance, compile
from splitfold.compiler.replay import replay
from splitfold.runtime import model_file
from splitfold.runtime.artifact import MANIFEST_FILE, read_manifest
from splitfold.runtime.digest import content_digest
from splitfold.runtime.errors import ArtifactError
from splitfold.runtime.model_file import read_model
from splitfold.runtime.session import Session

PIPELINES = [
    "canonicalize",
    "canonicalize,quantize-weights{block=16}",
    "canonicalize,quantize-activations,quantize-dynamic",
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(mlp(), tmp_path / "model.onnx")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return npz(tmp_path / "data.npz", x=samples(40))


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_round_trip(tmp_path: Path, model: Path, data: Path, pipeline: str) -> None:
    artifact = compile(model, pipeline=pipeline, calibration=data)
    folder = artifact.save(tmp_path / "out")
    loaded = Artifact.load(folder)
    assert content_digest(loaded.model) == content_digest(artifact.model)
    assert loaded.manifest == json.loads(json.dumps(dict(artifact.manifest)))
    feeds = {"x": samples(3)}
    expected = artifact.session().run(feeds)["y"]
    assert np.array_equal(loaded.session().run(feeds)["y"], expected)
    bare = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert np.array_equal(bare.run(None, feeds)[0], expected)
    assert sorted(file.name for file in folder.iterdir()) == [MANIFEST_FILE, "model.onnx"]


def test_one_file(tmp_path: Path, model: Path) -> None:
    artifact = compile(model, pipeline=PIPELINES[1])
    written = artifact.save_model(tmp_path / "new" / "small.onnx")
    assert list(written.parent.iterdir()) == [written]
    assert read_manifest(written)["pipeline"] == artifact.manifest["pipeline"]
    assert artifact.save_model(written) == written
    assert list(written.parent.iterdir()) == [written]


_SCRIPT = """
import sys
from splitfold.compiler import compile
model, data, out, pipeline = sys.argv[1:]
artifact = compile(model, pipeline=pipeline, calibration=data)
artifact.save(out)
"""


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_same_bytes_in_two_processes(tmp_path: Path, model: Path, data: Path, pipeline: str) -> None:
    trees = []
    for seed in ("1", "2"):
        out = tmp_path / f"out{seed}"
        command = [sys.executable, "-c", _SCRIPT, str(model), str(data), str(out), pipeline]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed}, cwd=tmp_path)
        trees.append(_tree(out))
    assert trees[0] == trees[1]


def test_the_manifest_holds_no_place_and_no_time(tmp_path: Path, model: Path, data: Path) -> None:
    folder = compile(model, pipeline=PIPELINES[2], calibration=data).save(tmp_path / "out")
    text = (folder / MANIFEST_FILE).read_text()
    assert str(tmp_path) not in text
    assert "seconds" not in text
    assert text == json.dumps(json.loads(text), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    assert str(tmp_path).encode() not in (folder / "model.onnx").read_bytes()


def test_overwriting_replaces_the_folder_as_a_whole(tmp_path: Path, model: Path) -> None:
    folder = compile(model, pipeline=PIPELINES[0]).save(tmp_path / "place" / "out")
    (folder / "stale.txt").write_text("from before")
    second = compile(model, pipeline=PIPELINES[1])
    second.save(folder, overwrite=True)
    assert sorted(file.name for file in folder.iterdir()) == [MANIFEST_FILE, "model.onnx"]
    assert [file.name for file in folder.parent.iterdir()] == ["out"]
    assert content_digest(Artifact.load(folder).model) == content_digest(second.model)


def test_a_replacement_that_fails_puts_the_old_back(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = compile(model, pipeline=PIPELINES[0])
    folder = artifact.save(tmp_path / "place" / "out")
    before = _tree(folder)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.startswith(".out-") and Path(target).name == "out":
            raise OSError("the disk went away")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ArtifactError, match="the disk went away"):
        artifact.save(folder, overwrite=True)
    assert _tree(folder) == before
    assert [file.name for file in folder.parent.iterdir()] == ["out"]


def test_changed_bytes_are_noticed(tmp_path: Path, model: Path) -> None:
    folder = compile(model, pipeline=PIPELINES[1]).save(tmp_path / "out")
    file = folder / "model.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        ArtifactError, match=r"model\.onnx is not the file that was verified: its digest differs"
    ):
        Artifact.load(folder)
    file.unlink()
    with pytest.raises(ArtifactError, match=r"lacks model\.onnx, which its manifest names"):
        Artifact.load(folder)


def test_folders_that_are_no_artifacts(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ArtifactError, match=r"absent is no artifact|no such file: .*absent"):
        Artifact.load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"empty is no artifact: it has no manifest\.json"):
        Artifact.load(tmp_path / "empty")
    (tmp_path / "empty" / MANIFEST_FILE).write_text('{"format": ')
    with pytest.raises(ArtifactError, match=r"carries no readable manifest"):
        Artifact.load(tmp_path / "empty")
    with pytest.raises(
        ArtifactError, match=r"model\.onnx carries no readable manifest: splitfold did not write it"
    ):
        read_manifest(model)


@pytest.fixture
def external(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_file, "_EXTERNAL_ABOVE", 1000)


@pytest.mark.usefixtures("external")
def test_weights_in_a_file_of_their_own(tmp_path: Path, model: Path) -> None:
    artifact = compile(model, pipeline=PIPELINES[1])
    folder = artifact.save(tmp_path / "out")
    assert sorted(file.name for file in folder.iterdir()) == [MANIFEST_FILE, "model.onnx", "model.onnx.data"]
    feeds = {"x": samples(3)}
    assert np.array_equal(Session(folder / "model.onnx").run(feeds)["y"], artifact.session().run(feeds)["y"])
    assert content_digest(Artifact.load(folder).model) == content_digest(artifact.model)
    assert replay(folder, model).same_files
    written = artifact.save_model(tmp_path / "one.onnx")
    assert replay(written, model).same_files
    with (folder / "model.onnx.data").open("r+b") as file:
        file.write(b"\x01")
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data is not the file that was verified"):
        Artifact.load(folder)


def test_weights_beside_the_original_come_along(tmp_path: Path, model: Path) -> None:
    (tmp_path / "split").mkdir()
    apart = tmp_path / "split" / "model.onnx"
    ir.save(ir.load(model), apart, external_data="weights.bin", size_threshold_bytes=0)
    whole, split = (compile(path, pipeline=PIPELINES[1]) for path in (model, apart))
    assert content_digest(split.model) == content_digest(whole.model)
    folder = split.save(tmp_path / "out")
    (tmp_path / "split" / "weights.bin").unlink()
    assert _tree(folder) == _tree(whole.save(tmp_path / "out2"))


def test_packed_codes_beside_a_model_are_read(tmp_path: Path) -> None:
    codes = ir.tensor(np.arange(-3, 4, dtype=np.int8), dtype=ir.DataType.INT4, name="codes")
    held = ir.Value(name="codes", type=ir.TensorType(codes.dtype), shape=codes.shape, const_value=codes)
    made = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT), shape=codes.shape)
    node = ir.node("Cast", [held], {"to": ir.DataType.FLOAT.value}, outputs=[made])
    graph = ir.Graph([], [made], nodes=[node], initializers=[held], opset_imports={"": 21})
    ir.save(
        ir.Model(graph, ir_version=10),
        tmp_path / "m.onnx",
        external_data="weights.bin",
        size_threshold_bytes=0,
    )
    assert Session(read_model(tmp_path / "m.onnx")).run({})["y"].tolist() == [-3, -2, -1, 0, 1, 2, 3]


# --- replay ---


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("bare", [False, True], ids=["folder", "file"])
def test_replay_bit_for_bit(tmp_path: Path, model: Path, data: Path, pipeline: str, bare: bool) -> None:
    artifact = compile(model, pipeline=pipeline, calibration=data)
    made = artifact.save_model(tmp_path / "out.onnx") if bare else artifact.save(tmp_path / "out")
    found = replay(made, model, calibration=data)
    assert found.same_model
    assert found.same_files
    assert found.warnings == ()


def test_replay_does_not_need_the_original_tolerance_or_metric(tmp_path: Path) -> None:
    proto = mlp()
    weight = numpy_helper.to_array(proto.graph.initializer[0]).copy()
    weight[0] *= 1000  # an outlier in each column, which the inputs never meet: the rest rounds to nothing
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w1"))
    inputs = {"x": samples(4)}
    inputs["x"][:, 0] = 0
    artifact = compile(
        proto,
        inputs,
        pipeline="quantize-weights{bits=2,block=256}",
        tolerance=Tolerance(cosine=None),
        evaluate=lambda session: float(session.run(inputs)["y"].std()),
    )
    assert artifact.manifest["metric"] is not None
    assert artifact.manifest["deviation"]["y"]["cosine"] < 0.9  # beyond the default tolerance
    assert replay(artifact.save(tmp_path / "out"), proto, inputs).same_files


def test_replay_of_another_model(tmp_path: Path, model: Path, data: Path) -> None:
    made = compile(model, pipeline=PIPELINES[1]).save(tmp_path / "out")
    other = saved(mlp(seed=9), tmp_path / "other.onnx")
    with pytest.raises(
        ArtifactError, match=r"not the model that .*out was made from.*Pass the original model"
    ):
        replay(made, other)


def test_replay_with_other_calibration(tmp_path: Path, model: Path, data: Path) -> None:
    made = compile(model, pipeline=PIPELINES[2], calibration=data).save(tmp_path / "out")
    with pytest.raises(
        ArtifactError, match=r"made with calibration data \(digest \w{12}\): pass the same data"
    ):
        replay(made, model)
    with pytest.raises(ArtifactError, match=r"not the calibration data that .*out was made from"):
        replay(made, model, calibration=npz(tmp_path / "other.npz", x=samples(40, seed=8)))


def test_replay_sees_a_changed_weight(tmp_path: Path, model: Path) -> None:
    artifact = compile(model, pipeline=PIPELINES[0])
    name, value = next(
        (n, v) for n, v in artifact.model.graph.initializers.items() if v.const_value is not None
    )
    array = value.const_value.numpy().copy()
    array.flat[0] += np.float32(1e-3)
    value.const_value = ir.tensor(array, name=name)
    found = replay(artifact.save(tmp_path / "out"), model)
    assert not found.same_model
    assert not found.same_files


def test_replay_warns_of_other_versions_and_inputs(tmp_path: Path, model: Path) -> None:
    artifact = compile(model, {"x": samples(5)}, pipeline=PIPELINES[1])
    versions = {**artifact.manifest["versions"], "onnxruntime": "1.0.0"}
    old = dataclasses.replace(artifact, manifest={**artifact.manifest, "versions": versions})
    found = replay(old.save(tmp_path / "out"), model)
    assert found.same_model
    assert not found.same_files
    assert any(text.startswith("onnxruntime was 1.0.0, is ") for text in found.warnings)
    assert any("other example inputs" in text for text in found.warnings)


def test_replay_of_another_format(tmp_path: Path, model: Path) -> None:
    artifact = compile(model, pipeline=PIPELINES[0])
    old = dataclasses.replace(artifact, manifest={**artifact.manifest, "format": 99})
    with pytest.raises(ArtifactError, match="manifest format 99; this version replays format"):
        replay(old.save(tmp_path / "out"), model)
