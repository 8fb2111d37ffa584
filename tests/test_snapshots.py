# SPDX-License-Identifier: Apache-2.0
"""Snapshots: valid models, whole files, weights once, and a pipeline that goes on from any of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from command_line import Run, assert_failed
from onnx import helper
from seeded import parse_graph
from small import WIDTH, initializer, mlp, model_of, samples, saved

from splitfold.compiler import compile, presets
from splitfold.compiler.debug.snapshots import Snapshots
from splitfold.passes.base import Context, Contract, Findings, Pass
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.errors import PassFailedError
from splitfold.passes.pipeline import PassRecord, Pipeline
from splitfold.passes.quantize_weights import QuantizeWeightsPass
from splitfold.passes.text import render_model
from splitfold.runtime import model_file
from splitfold.runtime.digest import content_digest
from splitfold.runtime.errors import ArtifactError
from splitfold.runtime.model_file import read_model
from splitfold.runtime.session import Session

CALIBRATION = [{"x": samples(8, seed=seed)} for seed in range(4)]
PIPELINES = {
    **{name: str(make()) for name, make in presets.PRESETS.items()},
    "qdq": "canonicalize,quantize-activations",
    "blocks": "canonicalize,quantize-weights{block=16,form=qdq}",
    "bits": "canonicalize,quantize-weights{bits=2,block=16},quantize-embeddings{bits=4,min-bytes=1}",
}
IF = """<ir_version: 9, opset_import: ["" : 20]>
g (bool c, float[batch, 32] x) => (float[batch, 32] y)
<float[32, 32] W = seeded>
{ a = MatMul (x, W)
  y = If (c) <
    then_branch = t () => (float[batch, 32] p) <float[32, 32] T = seeded> { p = MatMul (a, T) },
    else_branch = e () => (float[batch, 32] q) <float[32, 32] E = seeded> { q = MatMul (a, E) }>
}"""


def _convolutions() -> onnx.ModelProto:
    """Return a model with a batch norm to fold, a shared weight, and an embedding."""
    return parse_graph(
        """<ir_version: 9, opset_import: ["" : 20]>
        g (float[batch, 3, 8, 8] x, int64[batch] ids) => (float[batch, 16] y)
        <float[16, 3, 3, 3] W = seeded, float[16] s = seeded(1, 2), float[16] b = seeded,
         float[16] m = seeded, float[16] v = seeded(1, 2), float[32, 16] T = seeded, float[16, 16] P = seeded>
        { c = Conv (x, W)
          n = BatchNormalization (c, s, b, m, v)
          r = Relu (n)
          p = GlobalAveragePool (r)
          f = Flatten (p)
          e = Gather (T, ids)
          u = Add (f, e)
          h = MatMul (u, P)
          i = Identity (h)
          y = MatMul (i, P) }"""
    )


class _Digests:
    """Observer that keeps the digest of the model at each point."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.records: list[PassRecord] = []

    def before_pass(self, step: Pass, model: ir.Model, index: int, total: int) -> None:
        if index == 0:
            self.found, self.records = [content_digest(model)], []

    def after_pass(self, step: Pass, model: ir.Model, record: PassRecord) -> PassRecord:
        self.found.append(content_digest(model))
        self.records.append(record)
        return record


@dataclass(frozen=True)
class _Raises(Pass):
    name: ClassVar[str] = "raises"
    contract: ClassVar[Contract] = Contract.EXACT

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        raise RuntimeError("out of luck")


def _names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def _texts(folder: Path) -> list[str]:
    """Return the passes of a run, from the records."""
    return [json.loads(file.read_text())["text"] for file in sorted(folder.glob("*.json"))]


# --- what is written ---


def test_each_model_its_text_and_its_record(tmp_path: Path) -> None:
    folder, watch = tmp_path / "new" / "steps", _Digests()
    snapshots = Snapshots(folder)
    artifact = compile(
        mlp(), pipeline="canonicalize,quantize-weights{block=16}", observers=[watch, snapshots]
    )
    stems = ["00-input", "01-canonicalize", "02-quantize-weights", "03-legalize"]
    written = [f"{stem}{end}" for stem in stems for end in (".json", ".onnx", ".txt")]
    assert _names(folder) == [*written[1:], "weights.data"]  # nothing ran before the input
    assert snapshots.models == tuple(folder / f"{stem}.onnx" for stem in stems)
    models = [read_model(file) for file in snapshots.models]
    assert [content_digest(model) for model in models] == watch.found
    for file, model in zip(snapshots.models, models, strict=True):
        assert file.with_suffix(".txt").read_text() == f"{render_model(model)}\n"
        bare = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        assert bare.run(None, {"x": samples(2)})[0].shape == (2, 8)
    assert content_digest(models[-1]) == content_digest(artifact.model)


def test_a_record_holds_all_that_is_known(tmp_path: Path) -> None:
    watch = _Digests()
    pipeline = "canonicalize,quantize-weights{block=16,exclude=[encoder.down]}"
    compile(mlp(), CALIBRATION[0], pipeline=pipeline, observers=[watch, Snapshots(tmp_path / "s")])
    records = [json.loads(file.read_text()) for file in sorted((tmp_path / "s").glob("*.json"))]
    lossy = records[1]
    assert set(lossy) == set(PassRecord.__dataclass_fields__) - {"plan"}  # which this pass has none of
    assert [layer for layer, _ in lossy["applied"]] == ["encoder.up"]
    assert ["encoder.down", "excluded by option"] in lossy["skipped"]
    assert lossy["deviation"]["sqnr_db"] == pytest.approx(watch.records[1].deviation.sqnr_db)  # type: ignore[union-attr]
    assert lossy["seconds"] > 0
    assert [record["modified"] for record in records] == [record.modified for record in watch.records]


def test_weights_stand_in_the_folder_once(tmp_path: Path) -> None:
    proto = mlp()
    proto.graph.initializer.append(initializer("again", WIDTH, 64))  # the numbers of w1
    proto.graph.node.extend(
        [helper.make_node("MatMul", ["x", "again"], ["z"]), helper.make_node("Add", ["z", "hb"], ["zz"])]
    )
    proto.graph.node[2].input[0] = "zz"
    nodes = [proto.graph.node[at] for at in (0, 1, 4, 5, 2, 3)]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    compile(proto, pipeline="canonicalize,fold-scales{data-free=true}", observers=[Snapshots(tmp_path / "s")])
    held = {initializer("w1", WIDTH, 64).raw_data, initializer("w2", 64, 8, seed=2).raw_data}
    size = (tmp_path / "s" / "weights.data").stat().st_size
    assert size == sum(map(len, held))  # four models of three matrices, two of them equal
    assert all(file.stat().st_size < 4000 for file in (tmp_path / "s").glob("*.onnx"))


def test_nothing_but_the_folder_changes(tmp_path: Path) -> None:
    plain = compile(mlp(), pipeline=presets.int8(), calibration=CALIBRATION)
    watched = compile(
        mlp(), pipeline=presets.int8(), calibration=CALIBRATION, observers=[Snapshots(tmp_path / "s")]
    )
    assert watched.manifest == plain.manifest
    assert content_digest(watched.model) == content_digest(plain.model)
    for graph in watched.model.graphs():
        assert not any(isinstance(v.const_value, ir.ExternalTensor) for v in graph.initializers.values())


def test_subgraphs_and_packed_codes(tmp_path: Path) -> None:
    model = ir.from_proto(parse_graph(IF))
    watch, snapshots = _Digests(), Snapshots(tmp_path / "s")
    Pipeline.parse("canonicalize,quantize-weights{block=16,form=qdq}").run(
        model, observers=[watch, snapshots]
    )
    assert [content_digest(read_model(file)) for file in snapshots.models] == watch.found
    held = [v.const_value for graph in model.graphs() for v in graph.initializers.values()]
    assert any(tensor.dtype is ir.DataType.UINT4 for tensor in held if tensor is not None)
    for flag in (True, False):
        feeds = {"c": np.array(flag), "x": samples(2)}
        outputs = [Session(file).run(feeds)["y"] for file in snapshots.models]
        assert np.array_equal(outputs[-1], Session(model).run(feeds)["y"])
        assert np.allclose(outputs[0], outputs[1], atol=1e-5)


# --- going on from any of them ---


@pytest.mark.parametrize("pipeline", PIPELINES.values(), ids=PIPELINES)
@pytest.mark.parametrize("make", [mlp, _convolutions], ids=["mlp", "convolutions"])
def test_the_remaining_passes_give_the_same_model(tmp_path: Path, make: object, pipeline: str) -> None:
    proto = make()  # type: ignore[operator]
    data = [
        {"x": _image(seed), "ids": np.arange(4) + seed}
        if make is _convolutions
        else {"x": samples(8, seed=seed)}
        for seed in range(4)
    ]
    snapshots = Snapshots(tmp_path / "s")
    whole = compile(proto, pipeline=pipeline, calibration=data, observers=[snapshots])
    passes = _texts(tmp_path / "s")
    assert len(snapshots.models) == len(passes) + 1
    for done in range(1, len(passes)):
        rest = compile(snapshots.models[done], pipeline=",".join(passes[done:]), calibration=data)
        assert rest.records[0].text == "canonicalize"
        assert not rest.records[0].modified
        assert content_digest(rest.model) == content_digest(whole.model), f"after {passes[done - 1]}"


def _image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((4, 3, 8, 8)).astype(np.float32)


def test_on_the_command_line(run: Run) -> None:
    pipeline = "canonicalize,quantize-weights{block=16},quantize-dynamic"
    said = run("compile", "model.onnx", "-o", "out", "--pipeline", pipeline, "--snapshots", "steps").stdout
    assert "snapshots   5 models in steps\n" in said
    middle = Path("steps/02-quantize-weights.onnx")
    run("opt", middle, "-o", "rest.onnx", "--pipeline", "quantize-dynamic", "--snapshots", "more")
    assert content_digest(read_model(Path("rest.onnx"))) == content_digest(read_model(Path("out/model.onnx")))
    assert "com.microsoft::MatMulNBits 2" in run("inspect", middle).stdout
    assert "inf" in run("compare", "steps/00-input.onnx", "model.onnx").stdout
    run("opt", middle, "-o", "rest.onnx", "--snapshots", "more")  # replaces them, like rest.onnx
    assert [name for name in _names(Path("more")) if name.endswith(".onnx")] == [
        "00-input.onnx",
        "01-canonicalize.onnx",
        "02-legalize.onnx",
    ]


# --- runs that end early or start again ---


def test_a_run_that_fails_leaves_what_came_before(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "s")
    steps = Pipeline.of(CanonicalizePass(), QuantizeWeightsPass(block=16), _Raises())
    with pytest.raises(PassFailedError, match="out of luck"):
        compile(mlp(), pipeline=steps, observers=[snapshots])
    assert [file.name for file in snapshots.models] == [
        "00-input.onnx",
        "01-canonicalize.onnx",
        "02-quantize-weights.onnx",
    ]
    assert Session(snapshots.models[-1]).run({"x": samples(2)})["y"].shape == (2, 8)
    assert not [name for name in _names(tmp_path / "s") if name.startswith(".")]


def test_a_second_run_replaces_the_first(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "s")
    first = Pipeline.parse("canonicalize,quantize-weights{block=16},quantize-dynamic")
    first.run(ir.from_proto(mlp()), observers=[snapshots])
    second = ir.from_proto(mlp(seed=5))
    Pipeline.parse("quantize-dynamic").run(second, observers=[snapshots])
    assert [name for name in _names(tmp_path / "s") if name.endswith(".onnx")] == [
        "00-input.onnx",
        "01-quantize-dynamic.onnx",
    ]
    assert content_digest(read_model(snapshots.models[-1])) == content_digest(second)


@pytest.mark.parametrize("broken", [".onnx", ".txt", ".json"])
def test_a_file_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    replace = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if target.name.startswith("01-") and target.suffix == broken:
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(ArtifactError, match=r"cannot write snapshots to .*s: No space left on device"):
        compile(mlp(), pipeline="canonicalize", observers=[Snapshots(tmp_path / "s")])
    left = _names(tmp_path / "s")
    assert {"00-input.onnx", "00-input.txt", "weights.data"} <= set(left)
    assert not [name for name in left if name.startswith(".") or name == f"01-canonicalize{broken}"]
    assert content_digest(read_model(tmp_path / "s" / "00-input.onnx")) == content_digest(
        ir.from_proto(mlp())
    )


# --- folders ---


def test_a_folder_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "07-old.onnx").write_text("of an earlier run")
    (tmp_path / "weights.data").write_text("of an earlier run")
    with pytest.raises(ArtifactError, match=r"is not empty: choose another one, or pass overwrite=True"):
        Snapshots(tmp_path)
    compile(mlp(), pipeline="canonicalize", observers=[Snapshots(tmp_path, overwrite=True)])
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "07-old.onnx").exists()
    assert read_model(tmp_path / "02-legalize.onnx").graph.num_nodes() == 4
    with pytest.raises(ArtifactError, match=r"notes\.txt is a file, not a folder"):
        Snapshots(tmp_path / "notes.txt", overwrite=True)


def test_folders_on_the_command_line(run: Run) -> None:
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    words = ("compile", "model.onnx", "-o", "out", "--pipeline", "canonicalize")
    assert_failed(run(*words, "--snapshots", "full", code=1), "the folder full is not empty", "--overwrite")
    assert not Path("out").exists()
    assert "lies in the output" in run(*words, "--snapshots", "out/steps", code=2).stderr
    assert "the model lies in ." in run(*words, "--snapshots", ".", code=2).stderr
    run(*words, "--snapshots", "full", "--overwrite")
    assert {"notes.txt", "00-input.onnx"} <= set(_names(Path("full")))


def test_a_large_model_is_not_taken_away_under_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile(mlp(), pipeline="canonicalize", observers=[Snapshots(tmp_path / "s")])
    monkeypatch.setattr(model_file, "_EXTERNAL_ABOVE", 0)  # as a model of more than 1.5 GB is read
    source = tmp_path / "s" / "01-canonicalize.onnx"
    before = source.read_bytes()
    with pytest.raises(
        ArtifactError, match=r"the model reads its weights from .*weights\.data, which its own"
    ):
        compile(source, pipeline="canonicalize", observers=[Snapshots(tmp_path / "s", overwrite=True)])
    assert source.read_bytes() == before
    compile(source, pipeline="canonicalize", observers=[Snapshots(tmp_path / "t")])
    assert content_digest(read_model(tmp_path / "t" / "00-input.onnx")) == content_digest(read_model(source))


def test_a_model_without_weights(tmp_path: Path) -> None:
    nodes = [helper.make_node("Slice", ["x", "a", "b", "c"], ["s"]), helper.make_node("Relu", ["s"], ["y"])]
    ends = [
        onnx.numpy_helper.from_array(np.array([end]), name)
        for name, end in zip("abc", (0, 8, 1), strict=True)
    ]
    file = saved(model_of(nodes, ends, batch=4), tmp_path / "plain.onnx")
    compile(file, pipeline="canonicalize", observers=[Snapshots(tmp_path / "s")])
    assert "weights.data" not in _names(tmp_path / "s")
