# SPDX-License-Identifier: Apache-2.0
"""``splitfold plan``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from splitfold.compiler.cli.group import usage
from splitfold.compiler.cli.options import (
    CalibrationOption,
    DebugOption,
    InputsOption,
    TargetOption,
    VerboseOption,
    parse_metric,
    parse_target,
    read_inputs,
)
from splitfold.compiler.cli.output import errors, megabytes, out, say, table
from splitfold.compiler.cli.run_options import ModelArgument
from splitfold.compiler.cli.search_options import (
    CONFIDENCE,
    GOAL,
    LIMIT,
    CacheOption,
    ConfidenceOption,
    EvaluateOption,
    GoalOption,
    JobsOption,
    LimitOption,
    MaxDropOption,
    SecondsOption,
    StrictOption,
    TellTrials,
    check_search,
    parse_search,
    say_search,
)
from splitfold.compiler.locate import locate_data, locate_model
from splitfold.compiler.plan_picture import front_picture
from splitfold.compiler.planning import Planning, plan_precisions
from splitfold.compiler.search.options import Goal, Search
from splitfold.compiler.search.search import search_plan
from splitfold.passes.assign_precision import AssignPrecisionPass
from splitfold.passes.pipeline import Pipeline
from splitfold.passes.plan import PrecisionPlan, plan_text
from splitfold.passes.spec import parse_pass
from splitfold.runtime.errors import ArtifactError

__all__ = ["PLAN_HELP", "plan_command"]

_ROWS = 9
"""Plans of the front that are shown."""

PassOptions = Annotated[
    str,
    typer.Option(
        "--options",
        metavar="TEXT",
        help="Options of assign-precision: 'signal=sensitivity,choices=[w2,w4,w8],budget=[4.5bits]' "
        "(splitfold passes assign-precision lists them).",
    ),
]
BeforeOption = Annotated[
    str | None,
    typer.Option(
        "--before", metavar="TEXT", help="Passes that run first: 'fold-scales,quantize-embeddings'."
    ),
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE.toml", help="Write the plan to a file.")
]
PictureOption = Annotated[
    Path | None, typer.Option("--picture", metavar="FILE.svg", help="Draw the Pareto front.")
]


PLAN_HELP = """Plan which layer gets which precision, and print it with its reasons; nothing is compiled.

Shown beside it: the Pareto front, the best plans for other sizes. With --evaluate and --max-drop the
budget is the metric: plans of the front are carried out and measured.

\b
Example:
  splitfold plan model.onnx --calibration cal.npz --options 'budget=[4.5bits]' -o plan.toml
  splitfold compile model.onnx -o out --pipeline 'assign-precision{plan=plan.toml}' --calibration cal.npz
"""


def plan_command(
    model: ModelArgument,
    options: PassOptions = "",
    before: BeforeOption = None,
    calibration: CalibrationOption = None,
    inputs: InputsOption = None,
    evaluate: EvaluateOption = None,
    max_drop: MaxDropOption = None,
    goal: GoalOption = GOAL,
    limit: LimitOption = LIMIT,
    seconds: SecondsOption = None,
    confidence: ConfidenceOption = CONFIDENCE,
    cache: CacheOption = None,
    jobs: JobsOption = None,
    strict: StrictOption = False,
    target: TargetOption = "cpu",
    output: OutputOption = None,
    picture: PictureOption = None,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Print the plan of MODEL; the command's help is PLAN_HELP."""
    check_search(evaluate, max_drop, both=True)
    search = parse_search(goal, limit, seconds, confidence, cache, jobs, strict)
    step, first = _pass(options), _first(before)
    _check_folders(output, picture)
    source, example, place = locate_model(model), read_inputs(inputs), parse_target(target)
    with errors().status("measuring the layers"):
        planning = plan_precisions(
            source.model,
            step,
            before=first,
            example_inputs=example if example is not None else source.example_inputs,
            dynamic_shapes=source.dynamic_shapes,
            calibration=None if calibration is None else locate_data(calibration),
            target=place,
            timed=max_drop is not None and search.goal is Goal.FASTEST,
        )
    plan = planning.plan() if evaluate is None else _searched(planning, evaluate, max_drop, search)
    _print_layers(planning, plan)
    _print_front(planning, plan)
    _write(output, plan_text(plan))
    _write(picture, front_picture(planning.allocation, plan, f"{model}: {planning.allocation.scores.signal}"))


def _pass(options: str) -> AssignPrecisionPass:
    """Return the pass of ``--options``."""
    with usage("--options"):
        step = parse_pass(f"{AssignPrecisionPass.name}{{{options}}}", (AssignPrecisionPass,))
    assert isinstance(step, AssignPrecisionPass)
    return step


def _first(before: str | None) -> Pipeline:
    """Return the pipeline of ``--before``."""
    with usage("--before"):
        return Pipeline.parse(before or "")


def _searched(planning: Planning, evaluate: str, max_drop: float | None, search: Search) -> PrecisionPlan:
    assert max_drop is not None  # check_search asks for both or neither
    metric = parse_metric(evaluate)
    found = search_plan(planning, metric, max_drop, search=search, observers=[TellTrials()])
    say_search(found)
    return found.plan


def _print_layers(planning: Planning, plan: PrecisionPlan) -> None:
    rows = [
        [row.name, row.precision, f"{row.bytes:,}", _number(row.score), _number(row.loss), row.why]
        for row in plan.layers
    ]
    columns = ["layer", "precision", "bytes#", "score#", "loss#", "otherwise"]
    table(columns, rows, title=f"by {planning.allocation.scores.signal}")
    for layer, reason in planning.allocation.subject.refused:
        out().print(f"not planned: {layer}: {reason}", soft_wrap=True)
    say("signal", f"{planning.allocation.scores.signal}, {planning.allocation.scores.seconds:.1f} s")
    say("plan", ", ".join(f"{count} {word}" for word, count in plan.counts().items()) or "no layer")
    if plan.layers:
        total = plan.bytes + planning.allocation.rest_bytes
        say(
            "weights",
            f"{megabytes(total)}: {megabytes(plan.bytes)} in the plan's layers, "
            f"{plan.weight_bits:.2f} bits a weight as stored",
        )
        say(
            "loss",
            f"{_number(plan.loss)} expected: a sum over the layers, to be checked by measuring the result",
        )


def _print_front(planning: Planning, plan: PrecisionPlan) -> None:
    front = planning.allocation.front
    if not plan.layers:
        return
    wanted = sorted({round(at * (len(front) - 1) / (_ROWS - 1)) for at in range(_ROWS)})
    rows = []
    for position in wanted:
        point = planning.allocation.at(position)
        counts = ", ".join(f"{count} {word}" for word, count in point.counts().items())
        size = megabytes(point.bytes + planning.allocation.rest_bytes)
        rows.append([size, f"{point.weight_bits:.2f}", _number(point.loss), counts])
    table(
        ["weights#", "bits#", "loss#", "plan"],
        rows,
        title=f"Pareto front: {len(wanted)} of {len(front)} plans",
    )


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def _check_folders(*files: Path | None) -> None:
    for file in files:
        if file is not None and not file.absolute().parent.is_dir():
            raise ArtifactError(f"no such folder: {file.parent}")


def _write(file: Path | None, text: str) -> None:
    if file is None:
        return
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"cannot write {file}: {error}") from error
    say("written", file)
