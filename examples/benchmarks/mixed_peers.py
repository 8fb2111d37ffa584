# SPDX-License-Identifier: Apache-2.0
"""Mixed precision of other tools beside ours: decibels of the output, and milliseconds.

    python -m splitfold.examples.benchmarks.mixed_peers folder [--models resnet18 minilm]
        [--target target.json] [--steps others ours race] [--rounds 15] [--output mixed_peers.md]

AMD Quark's AutoMixprecision gives layers of an int8 model 16-bit activations until its measure reaches a
threshold; AIMET's Lite-MP gives a share of them int16, or float16, of which the exported file keeps float32.
Ours are the plans of least expected loss within a budget of milliseconds, of static int8 and fp32, and for
linear layers dynamic int8. All see the same calibration data and are measured on data that none saw, in bare
onnxruntime, timed in turns. The tools run in environments of their own in `folder`, made by pip. What is
made lies in `folder/made` with an index, so that each step can run by itself: the race wants a quiet machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from splitfold.compiler import compile, presets
from splitfold.compiler.planning import Planning, plan_precisions
from splitfold.examples.benchmarks.data import Feeds
from splitfold.examples.benchmarks.peer_subjects import SUBJECTS, Subject
from splitfold.examples.benchmarks.precision_peers import QUARK, QUARK_WORKER
from splitfold.examples.benchmarks.report import (
    Timing,
    arguments,
    console,
    interleaved,
    machine,
    open_bare,
    say,
)
from splitfold.examples.benchmarks.split_tables import Table, write_tables
from splitfold.examples.benchmarks.weight_peers import Environment, Peer
from splitfold.examples.benchmarks.weight_subjects import BitFormat
from splitfold.passes.assign_precision import AssignPrecisionPass
from splitfold.passes.base import Pass
from splitfold.passes.legalize import LegalizePass
from splitfold.passes.limits import Limit, Unit
from splitfold.passes.pipeline import Pipeline
from splitfold.passes.plan import PrecisionPlan
from splitfold.passes.precision import Precision
from splitfold.passes.quantize_activations import QuantizeActivationsPass
from splitfold.passes.ranges import Calibrator
from splitfold.runtime.errors import SplitfoldError
from splitfold.runtime.target import Target

AIMET = ("aimet-onnx==2.42.0", "onnxruntime==1.31.1", "onnx==1.23.2", "onnx-ir==1.1.0", "torch==2.13.0")
AIMET_WORKER = Path(__file__).with_name("mixed_aimet_worker.py")
INT8 = BitFormat(8, 0)
SHARES = (0.97, 0.94, 0.9, 0.85, 0.8, 0.7, 0.6)
"""Budgets of plans: shares of the milliseconds that the fastest choices of all layers save."""
LEVEL = 1.03
"""Ours is as fast as another where it takes at most so many times its milliseconds."""
SHAPES = ("batch 1", "batch 8", "1 x 128, no padding", "8 x 128, no padding")
"""Shapes that are timed."""
OURS, MADE = "splitfold", "made"
STEPS = ("others", "ours", "race")
COLUMNS = ("tool", "setting", "dB", "shape", "ms", "speed")


@dataclass(frozen=True)
class Tool:
    """Another tool.

    Attributes:
        name: what tables call it.
        requirements: what pip installs.
        worker: the script that calls it.
        settings: by model, options of the worker by name.
    """

    name: str
    requirements: tuple[str, ...]
    worker: Path
    settings: Mapping[str, Mapping[str, Mapping[str, Any]]]


def _threshold(*decibels: float) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {"int8": {"threshold": None}}
    return found | {f"{value:g} dB": {"threshold": value} for value in decibels}


def _share(*wanted: tuple[int, str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {"int8": {"percent": 0, "wide": "int16"}}
    return found | {f"{share} % {wide}": {"percent": share, "wide": wide} for share, wide in wanted}


TOOLS = (
    Tool(
        "Quark AutoMP",
        QUARK,
        QUARK_WORKER,
        {"resnet18": _threshold(26, 30), "minilm": _threshold(30)},
    ),
    Tool(
        "AIMET Lite-MP",
        AIMET,
        AIMET_WORKER,
        {
            "resnet18": _share(
                (5, "float16"), (10, "float16"), (20, "float16"), (10, "int16"), (20, "int16")
            ),
            "minilm": _share((10, "float16"), (20, "float16")),
        },
    ),
)
CHOICES = {
    False: (Precision.float(), Precision.int8_static()),
    True: (Precision.float(), Precision.int8_static(), Precision.int8_dynamic()),
}
"""What plans are made of, by whether the model is a transformer."""


@dataclass(frozen=True)
class Made:
    """One quantized file."""

    tool: str
    setting: str
    file: str
    decibels: float


def decibels(subject: Subject, path: Path) -> float:
    """SQNR of the output; of embeddings of length 1 it follows from their mean cosine."""
    fidelity = subject.fidelity(open_bare(path))
    return fidelity if subject.measure == "dB" else -10 * math.log10(2 * (1 - fidelity))


def others(key: str, subject: Subject, folder: Path) -> Iterator[Made]:
    """The files of other tools; those that lie there are not made again, and one that fails is said and left
    out."""
    for tool in TOOLS:
        environment = Environment(folder / tool.name.split()[0].lower(), tool.requirements, tool.worker)
        for setting, options in tool.settings[key].items():
            file = folder / MADE / f"{key} {tool.name} {setting}.onnx".replace(" ", "-")
            try:
                if not file.is_file():
                    environment.install()
                    peer = Peer(tool.name, tool.name.lower(), "", options=options)
                    made, seconds, _ = environment.call(peer, subject, INT8, 0)
                    shutil.copyfile(made, file)
                    say(f"{subject.name}: {tool.name} {setting} took {seconds:.0f} s")
                yield Made(tool.name, setting, file.name, decibels(subject, file))
            except Exception as error:
                lines = str(error).strip().splitlines() or [""]
                say(f"{subject.name}: {tool.name} {setting} fails: {type(error).__name__}: {lines[0][:200]}")


def timed_calibration(subject: Subject) -> list[Feeds]:
    """The calibration data, one sample of it first where the model is timed on one: the shapes of the first
    batch are those that plans are timed at."""
    batches = list(subject.batches)
    return batches if subject.transformer else [{name: x[:1] for name, x in batches[0].items()}, *batches]


def planning(subject: Subject, target: Target) -> Planning:
    """What our plans are made from: the passes of the preset that plans are searched with."""
    steps = presets.mixed().steps
    at = next(at for at, step in enumerate(steps) if isinstance(step, AssignPrecisionPass))
    limit, choices = Limit(1e9, Unit.MILLISECONDS), CHOICES[subject.transformer]
    step = AssignPrecisionPass(choices=choices, budget=(limit,), calibrator=Calibrator.EXTREME_VALUE)
    found = plan_precisions(
        subject.model,
        step,
        before=Pipeline(steps[:at]),
        calibration=timed_calibration(subject),
        target=target,
        timed=True,
    )
    return dataclasses.replace(found, after=Pipeline(steps[at + 1 :]) + Pipeline.of(LegalizePass()))


def ours(key: str, subject: Subject, folder: Path, target: Target) -> Iterator[Made]:
    """Our presets in int8, int8 with ranges by extreme values, as plans have them, and plans by budget."""
    kinds = {"int8": presets.int8, "int8, extreme-value": extreme_value}
    kinds |= {"int8-dynamic": presets.int8_dynamic} if subject.transformer else {}
    for name, preset in kinds.items():
        file = folder / MADE / f"{key}-{OURS}-{name}.onnx".replace(", ", "-")
        artifact = compile(
            subject.model, calibration=subject.batches, pipeline=preset(), reproducers=None, speed=None
        )
        artifact.save_model(file)
        yield Made(OURS, name, file.name, decibels(subject, file))
    found = planning(subject, target)
    plans: dict[tuple[str, ...], PrecisionPlan] = {}
    for share in SHARES:
        try:
            plan = found.allocation.within([budget(found, share)])
        except SplitfoldError as error:
            say(f"{subject.name}: {share:.0%} of the time saved: {error}")
            continue
        plans.setdefault(tuple(map(str, plan.precisions.values())), plan)
    for number, plan in enumerate(plans.values()):
        file = folder / MADE / f"{key}-{OURS}-plan-{number}.onnx"
        ir.save(found.carried_out(plan), file)
        counts = ", ".join(f"{count} {word}" for word, count in plan.counts().items())
        yield Made(OURS, counts, file.name, decibels(subject, file))


def extreme_value() -> Pipeline:
    """The preset, with ranges as more samples would show them."""

    def changed(step: Pass) -> Pass:
        if isinstance(step, QuantizeActivationsPass):
            return dataclasses.replace(step, calibrator=Calibrator.EXTREME_VALUE)
        return step

    return Pipeline.of(*map(changed, presets.int8().steps))


def budget(found: Planning, share: float) -> Limit:
    """The milliseconds of the float model, less a share of what can be saved."""
    times = found.allocation.times
    if times is None:
        raise ValueError("no times were measured")
    saved = -sum(min(own.values()) for own in times.more.values()) + sum(times.saved.values())
    return Limit(times.float_ms - share * saved, Unit.MILLISECONDS)


def timings(
    subject: Subject, made: Sequence[Made], folder: Path, rounds: int
) -> dict[str, dict[Made | None, Timing]]:
    """By shape and file (None is fp32), how long it takes."""
    found = {}
    for shape, feeds in subject.shapes.items():
        if shape not in SHAPES:
            continue
        files: dict[Made | None, Path] = {None: subject.model}
        files |= {it: folder / MADE / it.file for it in made}
        runs = {}
        for it, path in files.items():
            session = open_bare(path)
            given = {value.name: feeds[value.name] for value in session.get_inputs()}
            runs[it.file if it else ""] = lambda s=session, f=given: s.run(None, f)
        measured = interleaved(runs, rounds)
        found[shape] = {it: measured[it.file if it else ""] for it in files}
    return found


def compared(subject: Subject, made: Sequence[Made], folder: Path, rounds: int) -> Table:
    """All rows of one model, and whether one of ours is as near and as fast as each of the others."""
    table = Table(f"{subject.name}: decibels and milliseconds", COLUMNS)
    for shape, found in timings(subject, made, folder, rounds).items():
        table.add("fp32", "", "", shape, f"{found[None].seconds * 1e3:.2f}", "1.00x")
        for it in sorted(made, key=lambda it: it.decibels):
            timing = found[it]
            cells = (f"{it.decibels:.2f}", shape, f"{timing.seconds * 1e3:.2f}", f"{timing.ratio:.2f}x")
            table.add(it.tool, it.setting, *cells)
        own = [it for it in made if it.tool == OURS]
        for peer in (it for it in made if it.tool != OURS):
            as_fast = [it for it in own if found[it].ratio >= found[peer].ratio / LEVEL]
            best = max((it.decibels for it in as_fast), default=-math.inf)
            name = f"{peer.tool} {peer.setting}"
            text = f"{shape}: ours as fast as {name} has {best:.2f} dB against {peer.decibels:.2f}"
            table.expect(text, best >= peer.decibels)
    table.show()
    return table


def run(options: argparse.Namespace) -> list[Table]:
    """A table a model."""
    folder, tables = options.folder.resolve(), []
    (folder / MADE).mkdir(parents=True, exist_ok=True)
    target = Target.cpu().with_costs(options.target) if options.target else Target.cpu()
    for key in options.models:
        with tempfile.TemporaryDirectory() as name:
            subject = SUBJECTS[key](Path(name))
            makers = {
                "others": lambda key=key, it=subject: others(key, it, folder),
                "ours": lambda key=key, it=subject: ours(key, it, folder, target),
            }
            for step in (step for step in makers if step in options.steps):
                write_index(folder, key, step, makers[step]())
            if "race" in options.steps:
                made = [it for step in makers for it in read_index(folder, key, step)]
                tables.append(compared(subject, made, folder, options.rounds))
                write_tables(tables, options.output)
    return tables


def write_index(folder: Path, key: str, step: str, made: Iterable[Made]) -> None:
    """Keep what a step makes, for the race."""
    rows: list[dict[str, Any]] = []
    for it in made:
        say(f"{key}: {it.tool} {it.setting}: {it.decibels:.2f} dB")
        rows.append(dataclasses.asdict(it))
        (folder / MADE / f"{key}-{step}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def read_index(folder: Path, key: str, step: str) -> list[Made]:
    """What a step made; nothing where it never ran."""
    file = folder / MADE / f"{key}-{step}.json"
    return [Made(**row) for row in json.loads(file.read_text(encoding="utf-8"))] if file.is_file() else []


def main() -> int:
    """Print and write the tables."""
    options = arguments(
        __doc__,
        ("folder", {"type": Path, "help": "where the tools' environments and files are made, or were"}),
        ("--models", {"nargs": "+", "choices": ["resnet18", "minilm"], "default": ["resnet18", "minilm"]}),
        ("--steps", {"nargs": "+", "choices": STEPS, "default": STEPS}),
        ("--target", {"type": Path, "help": "kernel costs; without it plans measure layers themselves"}),
        ("--rounds", {"type": int, "default": 15, "help": "rounds of each latency measurement"}),
        ("--output", {"type": Path, "default": Path("mixed_peers.md"), "help": "Markdown file"}),
    )
    tables = run(options)
    console.print(machine(), soft_wrap=True)
    return int(any(not came for table in tables for _, came in table.verdicts))


if __name__ == "__main__":
    raise SystemExit(main())
