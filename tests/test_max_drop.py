# SPDX-License-Identifier: Apache-2.0
"""`compile` with a drop of a metric: what comes out, what its manifest says, the command line, and a real
model on a split that the search did not see."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from agreement import Agreement
from encoder import encoder, token_batches
from rich.console import Console
from small import mlp
from test_conformance import SHARED, _needs_shared

from splitfold.compiler import Budget, Search, Tolerance, Unmet, Unrealised, build, compile
from splitfold.compiler.compiled import Compiled
from splitfold.compiler.errors import BudgetError, EvaluationError
from splitfold.compiler.progress import Progress
from splitfold.compiler.realisation import Realisation
from splitfold.compiler.replay import replay
from splitfold.compiler.search.found import Stop
from splitfold.compiler.search.judgement import Decision
from splitfold.compiler.search.options import Goal
from splitfold.compiler.target_costs import model_cases
from splitfold.examples.benchmarks import data
from splitfold.examples.benchmarks.max_drop import Images
from splitfold.passes.errors import SpecError
from splitfold.passes.plan import plan_text
from splitfold.passes.precision import Precision
from splitfold.runtime.costs.kernel import Case, Form, Kernel, Operation
from splitfold.runtime.costs.machine import Machine
from splitfold.runtime.costs.table import KernelCosts, Sample
from splitfold.runtime.digest import content_digest
from splitfold.runtime.model_file import weight_bytes
from splitfold.runtime.session import Session
from splitfold.runtime.target import Target

CHOICES_ALL = "choices=[fp32,int8-dynamic,w4-b16,w2-b16]"
PIPELINE = f"fold-scales,assign-precision{{{CHOICES_ALL},signal=local-error}},quantize-embeddings"
FEEDS = {"ids": np.concatenate([batch["ids"] for batch in token_batches(20, seed=5)])}
DROP = 0.03


def model() -> onnx.ModelProto:
    return encoder(layers=1)


def evaluate() -> Agreement:
    return Agreement.with_model(ir.from_proto(model()), FEEDS)


def compiled(drop: float = DROP, pipeline: str | None = PIPELINE, **options: object) -> Compiled:
    return compile(
        model(),
        pipeline=pipeline,
        calibration=token_batches(2),
        evaluate=evaluate(),
        budget=Budget(max_drop=drop),
        unrealised=Unrealised.KEEP,
        **options,  # type: ignore[arg-type]
    )


# What comes out


def test_the_smallest_model_within_the_drop() -> None:
    artifact = compiled()
    found = artifact.search
    assert found is not None
    assert found.met
    assert found.stopped is Stop.FINISHED
    assert content_digest(artifact.model) == found.best.digest  # what was tried is what came out
    assert weight_bytes(artifact.model) == found.best.size < weight_bytes(compiled(DROP / 10).model)
    scores = evaluate()(artifact.session())
    assert float(np.mean(scores)) == pytest.approx(found.metric, abs=1e-12)
    metric, search = artifact.manifest["metric"], artifact.manifest["search"]
    assert metric["before"] - metric["after"] == pytest.approx(search["trials"][-1]["drop"]) or search["met"]
    assert search["max_drop"] == DROP
    assert len(search["trials"]) == len(found.trials)
    json.dumps(artifact.manifest, allow_nan=False)


@pytest.mark.parametrize(("cheap", "dear"), [("int8-dynamic", "w4-b16"), ("w4-b16", "int8-dynamic")])
def test_the_fastest_model_within_the_drop(cheap: str, dear: str) -> None:
    milliseconds = {carried(cheap): 0.25, carried(dear): 2.0}
    source = ir.from_proto(model())
    cases, _ = model_cases(source, token_batches(1)[0], Target.cpu())
    samples = {
        case: Sample(milliseconds.get(case.kernel, 1.0) * math.prod(case.shape) / 1e4, 0.0, 0.0, 1)
        for case in cases
    }
    samples |= {
        Case(carried("w4-b16"), case.shape): Sample(
            milliseconds[carried("w4-b16")] * math.prod(case.shape) / 1e4, 0.0, 0.0, 1
        )
        for case in cases
        if case.kernel == Kernel(Operation.MATMUL)
    }
    target = dataclasses.replace(Target.cpu(), costs=KernelCosts(Machine.here(), samples))
    artifact = compiled(
        0.2, f"assign-precision{{choices=[fp32,{cheap},{dear}]}}", target=target, search=Search(Goal.FASTEST)
    )
    found = artifact.search
    assert found is not None
    assert found.met
    counts = found.plan.counts()
    assert counts.get(cheap, 0) > 0  # the faster one is taken, whichever is smaller
    assert dear not in counts
    tried = [trial.milliseconds for trial in found.trials if trial.judgement.kept]
    assert found.best.milliseconds == min(tried)
    assert content_digest(artifact.model) == found.best.digest
    assert artifact.manifest["search"]["goal"] == "fastest"


def carried(precision: str) -> Kernel:
    """Return the kernel of a linear layer in a precision."""
    item = Precision.parse(precision)
    if item.weight is not None and item.weight.block is not None:
        return Kernel.blocks(item.weight.bits, item.weight.block, zero_points=not item.weight.symmetric)
    return Kernel(Operation.MATMUL, Form.DYNAMIC_INT8)


def test_without_a_pipeline_the_mixed_one_is_searched() -> None:
    artifact = compiled(pipeline=None)
    assert (
        "assign-precision{choices=[fp32,int8-static,int8-dynamic,w4],plan=" in artifact.manifest["pipeline"]
    )
    assert artifact.search is not None
    assert artifact.search.met


def test_a_drop_that_nothing_keeps() -> None:
    options = PIPELINE.replace("fp32,", "")
    artifact = compiled(1e-9, options)
    assert artifact.search is not None
    assert not artifact.search.met
    assert artifact.manifest["search"]["met"] is False
    assert "no model that was tried is within max_drop = 1e-09" in artifact.manifest["search"]["statement"]
    with pytest.raises(BudgetError, match="no plan keeps the metric"):
        compiled(1e-9, options, search=Search(unmet=Unmet.RAISE))


def test_the_tolerance_holds_in_the_search_too() -> None:
    free = compiled()
    tight = compiled(tolerance=Tolerance(cosine=0.9999))
    assert free.search is not None
    assert tight.search is not None
    assert tight.search.best.size > free.search.best.size
    reasons = [item.judgement.reason for item in tight.search.trials if item.judgement.reason]
    assert any("further from the reference than the tolerance allows" in reason for reason in reasons)


def test_a_model_that_the_compilation_changes_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer is said to be computed in no low-bit kernel, and goes back to float."""
    known = build.read_realisation
    rounds = iter(range(10))

    def realisation(*arguments: object) -> list[Realisation]:
        found = known(*arguments)  # type: ignore[arg-type]
        worst = Realisation(found[0].layer, "MatMul", False)
        return [worst, *found[1:]] if next(rounds) == 0 else found

    monkeypatch.setattr(build, "read_realisation", realisation)
    artifact = compile(
        model(),
        pipeline=PIPELINE,
        calibration=token_batches(2),
        evaluate=evaluate(),
        budget=Budget(max_drop=DROP),
    )
    found = artifact.search
    assert found is not None
    assert len(artifact.manifest["put_back"]) == 1
    assert "changed the model, which was measured again" in found.statement
    assert content_digest(artifact.model) == found.best.digest != found.trials[-2].digest
    assert float(np.mean(evaluate()(artifact.session()))) == pytest.approx(found.metric, abs=1e-12)
    assert found.best.size == weight_bytes(artifact.model) > min(item.size for item in found.trials)
    assert found.met


def test_simulated_layers_count_as_packed_codes() -> None:
    feeds = {"x": np.random.default_rng(0).standard_normal((200, 32)).astype(np.float32)}
    artifact = compile(
        mlp(),
        pipeline="assign-precision{choices=[sim-w8,sim-w4,sim-w2],signal=uniform,error=bits}",
        evaluate=Agreement.with_model(ir.from_proto(mlp()), feeds),
        budget=Budget(max_drop=0.3),
        search=Search(resolution=0),
        tolerance=Tolerance(cosine=None),
    )
    found = artifact.search
    assert found is not None
    assert found.best.size == min(item.size for item in found.trials if item.judgement.kept)
    assert found.best.size < weight_bytes(artifact.model) / 3
    assert content_digest(artifact.model) == found.best.digest


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [
        ("quantize-dynamic", "the pipeline holds none of it"),
        ("assign-precision,assign-precision", "holds 2 of it"),
        ("assign-precision{plan=nowhere.toml}", "reads its plan from a file"),
    ],
)
def test_pipelines_without_plans_to_search(pipeline: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        compiled(pipeline=pipeline)


def test_a_drop_needs_a_metric() -> None:
    with pytest.raises(ValueError, match="give evaluate"):
        compile(mlp(), budget=Budget(max_drop=0.1))
    with pytest.raises(ValueError, match="max_drop is -1"):
        Budget(max_drop=-1)


def test_scores_are_a_metric_without_a_search_too() -> None:
    artifact = compile(model(), pipeline="quantize-dynamic", evaluate=evaluate())
    assert artifact.manifest["metric"]["after"] == pytest.approx(
        float(np.mean(evaluate()(Session(artifact.model))))
    )
    with pytest.raises(EvaluationError, match="returned a dict for the original model"):
        compile(model(), pipeline="quantize-dynamic", evaluate=lambda session: {"accuracy": 1})  # type: ignore[arg-type,return-value]


def test_progress_is_drawn() -> None:
    drawn = io.StringIO()
    with Progress(Console(file=drawn, force_terminal=True, width=160)) as progress:
        compiled(observers=[progress])
    assert "evaluations (metric" in drawn.getvalue()


# A real model


@pytest.mark.slow
def test_a_drop_is_kept_on_images_that_the_search_did_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNet-20 in simulated bits: the search sees 500 images, 1,500 others judge."""
    _needs_shared("data/images/cifar10")
    monkeypatch.setenv("SPLITFOLD_SHARED", str(SHARED))
    images, labels = data.cifar10("test_5k")
    order = np.random.default_rng(0).permutation(len(images))
    seen, unseen = (Images(images[part], labels[part]) for part in (order[:500], order[500:2000]))
    found = compile(
        _needs_shared("models") / "resnet20_cifar10.onnx",
        pipeline="assign-precision{choices=[sim-w8a8,sim-w4a4,sim-w2a4],signal=local-error}",
        calibration=data.batches("input", data.cifar10("train_20k")[0][:32], 32),
        evaluate=seen,
        budget=Budget(max_drop=0.03),
        search=Search(evaluations=5),
    )
    assert found.search is not None
    assert found.search.met
    assert set(found.search.plan.counts()) > {"sim-w4a4"}  # more than one precision: the metric binds
    assert any(item.judgement.decision is Decision.BROKEN for item in found.search.trials)
    lost = unseen(Session(found.source.model)) * 1.0 - unseen(found.session())
    assert lost.mean() <= 0.03


# Plans in the manifest


def test_an_artifact_says_which_plan_made_it_and_needs_no_file_for_a_replay(tmp_path: Path) -> None:
    made = compiled()
    assert made.search is not None
    file = tmp_path / "plan.toml"
    file.write_text(plan_text(made.search.plan), encoding="utf-8")
    step = f"assign-precision{{plan={file}}}"
    artifact = compile(
        model(), pipeline=f"fold-scales,{step}", calibration=token_batches(2), unrealised=Unrealised.KEEP
    )
    digest = made.search.plan.digest
    assert f'digest = "{digest}"' in file.read_text(encoding="utf-8")
    assert f"assign-precision{{plan={digest[:16]}}}" in artifact.manifest["pipeline"]
    assert str(tmp_path) not in json.dumps(artifact.manifest)
    assert artifact.manifest["plans"][digest]["layers"] == {
        name: str(item) for name, item in made.search.plan.precisions.items()
    }
    artifact.save(tmp_path / "out")
    file.unlink()
    again = replay(tmp_path / "out", model(), calibration=token_batches(2))
    assert again.same_files
    assert not again.warnings


def test_a_searched_artifact_is_replayed_without_its_metric(tmp_path: Path) -> None:
    compiled().save(tmp_path / "out")
    again = replay(tmp_path / "out", model(), calibration=token_batches(2))
    assert again.same_files
    assert not again.warnings


def test_where_another_plan_would_be_made_the_recorded_one_is_carried_out(tmp_path: Path) -> None:
    text = "assign-precision{choices=[w8,w2],budget=[5code-bits],signal=uniform,error=bits}"
    place = compile(model(), pipeline=text, unrealised=Unrealised.KEEP).save(tmp_path / "out")
    manifest = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
    (digest,) = manifest["plans"]
    turned = {"w8": "w2", "w2": "w8"}
    layers = manifest["plans"][digest]["layers"]
    manifest["plans"][digest]["layers"] = {name: turned[word] for name, word in layers.items()}
    (place / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    again = replay(place, model())
    assert any("the recorded one was carried out" in warning for warning in again.warnings)
    assert not again.same_model


def test_an_edited_plan_does_not_pass_for_the_one_that_was_made(tmp_path: Path) -> None:
    made = compiled()
    assert made.search is not None
    row = made.search.plan.layers[0]
    file, text = tmp_path / "plan.toml", plan_text(made.search.plan)
    before, name = f'precision = "{row.precision}"', f'name = "{row.name}"'
    file.write_text(text.replace(f"{name}, {before}", f'{name}, precision = "w8-b16"'), encoding="utf-8")
    artifact = compile(model(), pipeline=f"assign-precision{{plan={file}}}", unrealised=Unrealised.KEEP)
    (digest,) = artifact.manifest["plans"]
    assert digest != made.search.plan.digest
    assert artifact.manifest["plans"][digest]["edited"]
    notes = [note for record in artifact.records for note in record.notes]
    assert any(note.startswith("plan edited by hand: ") for note in notes)
    artifact.save(tmp_path / "out")
    file.unlink()
    assert replay(tmp_path / "out", model()).same_files
