# SPDX-License-Identifier: Apache-2.0
"""Plans: made within budgets, written, edited, given back; searched by a metric; and what is refused."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from encoder import encoder, token_batches
from small import mlp

from splitfold.compiler import compile
from splitfold.compiler.errors import BudgetError
from splitfold.compiler.planning import Planning, plan_precisions
from splitfold.compiler.realisation import Unrealised
from splitfold.passes.allocation import Allocation
from splitfold.passes.assign_precision import AssignPrecisionPass
from splitfold.passes.base import Context
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.errors import SpecError
from splitfold.passes.limits import Limit
from splitfold.passes.piece_times import PieceTimes
from splitfold.passes.plan import PlannedLayer, PrecisionPlan, plan_text, read_plan
from splitfold.passes.precision import Precision
from splitfold.passes.spec import parse_pass
from splitfold.passes.table import PASSES
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.model_file import weight_bytes

UP, DOWN = "encoder.up", "encoder.down"


def step(text: str) -> AssignPrecisionPass:
    found = parse_pass(f"assign-precision{{{text}}}", PASSES)
    assert isinstance(found, AssignPrecisionPass)
    return found


def small() -> ir.Model:
    model = ir.from_proto(encoder(layers=1))
    CanonicalizePass()(model)
    return model


@cache
def planning(text: str = "choices=[fp32,int8-dynamic,w4-b16,w2-b16],signal=local-error") -> Planning:
    return plan_precisions(ir.from_proto(encoder(layers=1)), step(text), calibration=token_batches(2))


# Options


def test_options_round_trip() -> None:
    text = "assign-precision{signal=random,choices=[fp32,w4-b64-sym],budget=[5bits,3MB],turned=true,seed=3}"
    assert str(parse_pass(text, PASSES)) == text
    assert parse_pass("assign-precision{budget=3bits}", PASSES) == step("budget=[3bits]")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("choices=[fp32]", "no low-bit precision"),
        ("choices=[]", "no low-bit precision"),
        ("choices=[w4,w4-b32]", "given twice"),
        ("choices=[w4,sim-w4a4]", "not both"),
        ("budget=[]", "budget is empty"),
        ("budget=[4bits,5bits]", "two limits of one unit"),
        ("choices=[w4,in8-static]", "Did you mean 'int8-static'"),
        ("signal=sensitivty", "Did you mean 'sensitivity'"),
    ],
)
def test_options_that_make_no_plan_are_refused(text: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        step(text)


# Budgets


def test_each_unit_is_kept_and_planned_bytes_are_those_of_the_model() -> None:
    allocation, model = planning().allocation, planning().model
    for word in ("20bits", "6bits", "12code-bits", "0.012MB"):
        plan = allocation.within([Limit.parse(word)])
        made = planning().carried_out(plan)
        assert weight_bytes(made) == plan.bytes + allocation.rest_bytes
        weights = sum(row.weights for row in plan.layers)
        codes = sum(row.weights * row.precision.weight_bits for row in plan.layers)
        spent = {"bits": plan.weight_bits, "code-bits": codes / weights, "MB": weight_bytes(made) / 1e6}
        limit = Limit.parse(word)
        assert spent[limit.unit.value] <= limit.amount
        assert {row.name for row in plan.layers} == {
            layer.name for layer in planning().allocation.subject.layers
        }
    assert weight_bytes(model) == allocation.rest_bytes + sum(
        item.bytes(Precision.float()) for item in allocation.tied
    )


def test_more_budget_is_never_worse() -> None:
    losses = [
        planning().allocation.within([Limit.parse(f"{bits}bits")]).loss for bits in (5.5, 7, 9, 14, 25, 32)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0  # all in float


def test_the_front_is_what_budgets_give() -> None:
    front = planning().allocation.front
    for position in range(0, len(front), 5):
        point = planning().allocation.at(position)
        megabytes = (point.bytes + planning().allocation.rest_bytes) / 1e6
        plan = planning().allocation.within([Limit.parse(f"{megabytes + 1e-9:.9f}MB")])
        assert plan.loss == pytest.approx(point.loss)


def test_a_budget_out_of_reach_says_what_is_reached_and_what_binds() -> None:
    with pytest.raises(BudgetError, match="in its cheapest choice it is") as raised:
        planning().allocation.within([Limit.parse("3bits")])
    assert raised.value.binds == "3bits"
    assert raised.value.reached.endswith("bits a weight")
    with pytest.raises(BudgetError, match="MB of the model are in no layer of the plan"):
        planning().allocation.within([Limit.parse("0.001MB")])


def timed() -> Allocation:
    """Return an allocation in which fewer bits take longer: size and time pull apart."""
    found = planning().allocation
    ms = {"fp32": 0.0, "int8-dynamic": -0.5, "w4-b16": 1.0, "w2-b16": 2.0}
    times = {
        layer.name: {item: ms[str(item)] for item in found.subject.choices[layer.name]}
        for layer in found.subject.layers
    }
    return Allocation(found.subject, found.scores, found.losses, PieceTimes(10.0, times))


def test_two_budgets_hold_together() -> None:
    allocation = timed()
    small_, fast = Limit.parse("7bits"), Limit.parse("13ms")
    plan = allocation.within([Limit.parse("8.5bits"), fast])
    assert plan.weight_bits <= 8.5
    more = sum(allocation.times.more[row.name][row.precision] for row in plan.layers if allocation.times)
    assert 10 + more <= 13
    assert plan.loss >= allocation.within([Limit.parse("8.5bits")]).loss
    with pytest.raises(BudgetError, match="together, though each alone") as raised:
        allocation.within([small_, Limit.parse("8ms")])
    assert "7bits" in raised.value.binds
    assert "8ms" in raised.value.binds
    assert "ms at best" in str(raised.value) or "ms" in raised.value.reached


def test_times_are_measured_where_the_budget_is_of_time() -> None:
    made = plan_precisions(
        ir.from_proto(mlp()),
        step("choices=[fp32,int8-dynamic],signal=uniform,error=bits,budget=[1000ms]"),
        calibration=[{"x": np.ones((2, 32), np.float32)}],
    )
    times = made.allocation.times
    assert times is not None
    assert times.float_ms > 0
    assert all(own[Precision.float()] == 0 != own[Precision.int8_dynamic()] for own in times.more.values())
    assert made.plan().counts() == {"fp32": 2}


def test_layers_that_share_a_weight_get_one_precision() -> None:
    text = (
        '<ir_version: 9, opset_import: ["" : 20]> net (float[batch,32] x) => (float[batch,32] y) '
        "<float[32,32] W = {}> {{ [first] h = MatMul(x, W) [act] a = Relu(h) [second] y = MatMul(a, W) }}"
    )
    values = np.random.default_rng(0).standard_normal(32 * 32).astype(np.float32)
    model = ir.from_onnx_text(text.format("{" + ", ".join(map(str, values)) + "}"))
    made = plan_precisions(
        model, step("choices=[w2,w8],budget=[8code-bits]"), calibration=[{"x": values[:64].reshape(2, 32)}]
    )
    plan = made.plan()
    assert [str(row.precision) for row in plan.layers] == ["w8", "w8"]
    assert plan.layers[1].bytes == 0
    assert weight_bytes(made.carried_out(plan)) == plan.bytes + made.allocation.rest_bytes


# Files


def test_a_plan_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    plan = planning().allocation.within([Limit.parse("9bits")])
    file = tmp_path / "plan.toml"
    file.write_text(plan_text(plan), encoding="utf-8")
    assert read_plan(file) == plan
    assert plan_text(read_plan(file)) == plan_text(plan)
    as_json = {
        "signal": plan.signal,
        "layers": [{"name": row.name, "precision": str(row.precision)} for row in plan.layers],
    }
    file.with_suffix(".json").write_text(json.dumps(as_json), encoding="utf-8")
    assert read_plan(file.with_suffix(".json")).precisions == plan.precisions


def test_odd_names_and_numbers_survive(tmp_path: Path) -> None:
    layers = (
        PlannedLayer('a "quoted\\" layer.0', Precision.blocks(4), score=-math.inf, loss=1e-30, why="è\n"),
        PlannedLayer("plain", Precision.float()),
    )
    text = plan_text(PrecisionPlan(layers))
    (tmp_path / "plan.toml").write_text(text, encoding="utf-8")
    assert plan_text(read_plan(tmp_path / "plan.toml")) == text


def test_an_edited_plan_is_carried_out(tmp_path: Path) -> None:
    plan = planning().allocation.within([Limit.parse("9bits")])
    name = plan.layers[0].name
    text = "\n".join(
        line.replace(f'precision = "{plan.layers[0].precision}"', 'precision = "w8-b128"')
        if name in line
        else line
        for line in plan_text(plan).splitlines()
        if plan.layers[1].name not in line  # left out: stays as it is
    )
    file = tmp_path / "plan.toml"
    file.write_text(text, encoding="utf-8")
    artifact = compile(
        ir.from_proto(encoder(layers=1)),
        pipeline=f"canonicalize,assign-precision{{plan={file}}}",
        calibration=token_batches(2),
        unrealised=Unrealised.KEEP,
    )
    record = next(record for record in artifact.records if record.text.startswith("assign-precision"))
    assert dict(record.applied)[name] == "MatMul weights in 8 bits"
    assert plan.layers[1].name not in dict(record.applied)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('layers = [{ name = "encoder.uP", precision = "w4" }]', "Did you mean 'encoder.up'"),
        (
            'layers = [{ name = "encoder.up", precision = "w44" }]',
            r"layers\[0\] \('encoder.up'\): unknown precision",
        ),
        ('layers = [{ name = "encoder.up" }]', "precision .* is missing"),
        ('layers = [{ precision = "w4" }]', "name is missing"),
        (
            'layers = [{ name = "a", precision = "w4" }, { name = "a", precision = "w8" }]',
            "stands there twice",
        ),
        ('layers = [{ name = "a", precison = "w4" }]', "Did you mean 'precision'"),
        ('layers = [{ name = "a", precision = "w4", bytes = "many" }]', "not a number"),
        ("layer = []", "Did you mean 'layers'"),
        ("layers = 3", "a plan holds layers"),
        ("layers = [", "neither TOML nor JSON"),
    ],
)
def test_files_that_are_no_plan_are_refused(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(text, encoding="utf-8")
    model = ir.from_proto(mlp())
    CanonicalizePass()(model)
    with pytest.raises(SpecError, match=words):
        AssignPrecisionPass(plan=str(file)).run(model, Context())


def test_no_such_plan() -> None:
    with pytest.raises(SpecError, match=r"no such plan: nowhere\.toml"):
        read_plan("nowhere.toml")


# The pass


def test_what_the_plan_leaves_in_float_stays_so_and_says_why() -> None:
    model, context = small(), Context(calibration=Calibration.of(token_batches(2)))
    assign = step("choices=[fp32,int8-dynamic],budget=[20code-bits],signal=local-error")
    findings = assign.run(model, context).findings
    kept = [layer for layer, reason in findings.skipped if "leaves it in fp32" in reason]
    assert kept
    assert findings.applied
    assert any("20code-bits" in note for note in findings.notes)
    again = assign.run(model, context)
    assert not again.modified
    assert {layer for layer, reason in again.findings.skipped if "a plan left it" in reason} == set(kept)


def test_record_says_what_other_choices_would_have_changed() -> None:
    findings = step("choices=[w2-b16,w4-b16],signal=uniform,error=bits").run(small(), Context()).findings
    reasons = [reason for _, pattern, reason in findings.missed if pattern == "another precision"]
    assert len(reasons) == 6
    assert all(reason.startswith("w2-b16: -") for reason in reasons)
