# SPDX-License-Identifier: Apache-2.0
"""Options of a session travel in the manifest, and sessions of the artifact have them; presets need none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from command_line import Run
from seeded import feeds_for, parse_graph

from splitfold.compiler import compile, presets
from splitfold.compiler.replay import replay
from splitfold.runtime.artifact import Artifact
from splitfold.runtime.bench import bench
from splitfold.runtime.costs.kernel import Case, Kernel, Operation
from splitfold.runtime.costs.measure import SessionMeter
from splitfold.runtime.costs.models import case_model
from splitfold.runtime.errors import ArtifactError
from splitfold.runtime.options import SessionOptions
from splitfold.runtime.profile import trace
from splitfold.runtime.race import race_models
from splitfold.runtime.session import Session, optimized_graph
from splitfold.runtime.target import Target

NORM = (
    '<ir_version: 10, opset_import: ["" : 20]>\n'
    "net (float[b,5,8] x) => (float[b,5,8] y) <float[8,8] W = seeded, float[8] g = seeded> "
    "{ [dense] h = MatMul(x, W) r = Add(h, x) y = LayerNormalization(r, g) }"
)
ALL = SessionOptions(
    threads=1,
    spinning=False,
    arena=False,
    disabled_optimizers=("SkipLayerNormFusion",),
    entries=(("session.set_denormal_as_zero", "1"),),
)


def model() -> ir.Model:
    return ir.from_proto(parse_graph(NORM))


def compiled(options: SessionOptions) -> Artifact:
    target = Target.cpu().with_options(options)
    return compile(model(), pipeline="canonicalize", target=target, speed=None, reproducers=None)


def test_the_runtime_is_given_them() -> None:
    plain, asked = Target.cpu(), Target.cpu().with_options(ALL)
    found = [{node.op_type for node in optimized_graph(model(), target).graph} for target in (plain, asked)]
    assert "SkipLayerNormalization" in found[0]
    assert "SkipLayerNormalization" not in found[1]
    options = Session(model(), asked)._session.get_session_options()
    assert (options.intra_op_num_threads, options.enable_cpu_mem_arena) == (1, False)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.get_session_config_entry("session.set_denormal_as_zero") == "1"
    assert Session(model(), asked, threads=2)._session.get_session_options().intra_op_num_threads == 2


@pytest.mark.parametrize("options", [SessionOptions(), ALL, SessionOptions(threads=3)])
def test_they_travel_in_the_manifest(tmp_path: Path, options: SessionOptions) -> None:
    artifact = compiled(options)
    folder = artifact.save(tmp_path / "out")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["session"] == options.values()
    loaded = Artifact.load(folder)
    assert loaded.target.options == options
    assert loaded.session()._session.get_session_options().intra_op_num_threads == options.threads
    assert replay(folder, model()).same_files


def test_presets_need_none(tmp_path: Path) -> None:
    artifact = compile(model(), pipeline=presets.exact(), speed=None, reproducers=None)
    assert artifact.manifest["session"] == {}
    folder = artifact.save(tmp_path / "out")
    feeds = feeds_for(model())
    bare = onnxruntime.InferenceSession(folder / "model.onnx").run(None, feeds)[0]
    np.testing.assert_array_equal(bare, artifact.session().run(feeds)["y"])


@pytest.mark.parametrize("options", [SessionOptions(), ALL, SessionOptions(arena=False)])
def test_the_text_opens_a_bare_session_with_them(tmp_path: Path, options: SessionOptions) -> None:
    path = compiled(options).save_model(tmp_path / "m.onnx")
    scope: dict[str, object] = {"onnxruntime": onnxruntime}
    exec(options.code(str(path)), scope)
    session = scope["session"]
    assert isinstance(session, onnxruntime.InferenceSession)
    found = session.get_session_options()
    assert found.intra_op_num_threads == options.threads
    assert found.enable_cpu_mem_arena == options.arena


def test_text_form_of_values() -> None:
    assert SessionOptions().values() == {}
    assert not SessionOptions()
    assert SessionOptions.of(json.loads(json.dumps(ALL.values()))) == ALL


@pytest.mark.parametrize(
    "values", [[], {"theads": 1}, {"threads": "2"}, {"threads": True}, {"spinning": 0}, {"entries": []}]
)
def test_a_manifest_that_says_something_else(values: object) -> None:
    with pytest.raises(ArtifactError, match="session option"):
        SessionOptions.of(values)


def test_negative_threads() -> None:
    with pytest.raises(ValueError, match="threads is -1"):
        SessionOptions(threads=-1)


def test_command_line(tmp_path: Path, run: Run) -> None:
    ir.save(model(), tmp_path / "m.onnx")
    text = "threads=1,spinning=false,disable=[SkipLayerNormFusion],session.set_denormal_as_zero=1"
    args = ["compile", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "out"), "--preset", "exact"]
    done = run(*args, "--if-slower", "off", "--session", text)
    assert "disabled_optimizers=['SkipLayerNormFusion']" in done.output
    recorded = Artifact.load(tmp_path / "out").target.options
    assert recorded == SessionOptions(
        1, False, True, ("SkipLayerNormFusion",), (("session.set_denormal_as_zero", "1"),)
    )
    assert "allow_spinning" in run("inspect", str(tmp_path / "out")).output


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("thread=2", "Did you mean 'threads'"),
        ("threads=two", "whole number"),
        ("arena=maybe", "true or false"),
        ("spinning", "give a value"),
    ],
)
def test_command_line_refuses(tmp_path: Path, run: Run, text: str, words: str) -> None:
    ir.save(model(), tmp_path / "m.onnx")
    done = run("compile", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "out"), "--session", text, code=2)
    assert words in done.output
    assert not (tmp_path / "out").exists()


def test_sessions_that_are_timed_in_turns_leave_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the options are: idle threads of one would slow down the next."""
    target = Target.cpu().with_options(ALL).taking_turns()
    options = Session(model(), target)._session.get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    assert options.get_session_config_entry("session.set_denormal_as_zero") == "1"
    opened: list[Target] = []
    started = Session.__init__

    def watched(self: Session, *given: object, **named: object) -> None:
        opened.append(named.get("target") or next(item for item in given if isinstance(item, Target)))  # type: ignore[arg-type]
        started(self, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Session, "__init__", watched)
    feeds = feeds_for(model(), "")
    race_models(model(), model(), feeds, seconds=0.01)
    bench([model(), model()], feeds, runs=1)
    trace([model()], feeds, runs=1)
    SessionMeter(Target.cpu(), seconds=0.01)([case_model(Case(Kernel(Operation.GELU), (2, 4)))])
    assert len(opened) == 6
    assert all(dict(item.options.entries)["session.force_spinning_stop"] == "1" for item in opened)


def test_bench_and_compare_open_an_artifact_as_its_manifest_says(tmp_path: Path, run: Run) -> None:
    ir.save(model(), tmp_path / "model.onnx")
    compiled(SessionOptions(threads=1, disabled_optimizers=("SkipLayerNormFusion",))).save(tmp_path / "out")
    done = run("bench", tmp_path / "model.onnx", tmp_path / "out", "--runs", 2)
    assert '"disabled_optimizers": ["SkipLayerNormFusion"]' in done.output
    run("compare", tmp_path / "model.onnx", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["session"] = {"disabled_optimizers": ["NoSuchOptimizer"], "threads": "many"}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    for command in ("bench", "compare"):
        failed = run(command, tmp_path / "model.onnx", tmp_path / "out", code=1)
        assert "session option threads = 'many'" in failed.output.replace("\n", " ")
