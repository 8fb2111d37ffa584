# SPDX-License-Identifier: Apache-2.0
"""``splitfold calibrate-target``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from splitfold.compiler.cli.compare_command import DataOption
from splitfold.compiler.cli.data import open_data
from splitfold.compiler.cli.options import DebugOption, first_feeds, parse_target
from splitfold.compiler.cli.output import errors, out, say, table
from splitfold.compiler.cli.run_options import BatchOption, ThreadsOption
from splitfold.compiler.target_costs import CostsMeasured, known_costs, measure_costs, model_cases
from splitfold.runtime.costs.file import write_costs
from splitfold.runtime.costs.grid import common_cases
from splitfold.runtime.costs.kernel import AXES, Case, Kernel, Operation
from splitfold.runtime.costs.machine import Machine
from splitfold.runtime.costs.measure import SessionMeter
from splitfold.runtime.costs.table import KernelCosts
from splitfold.runtime.model_file import model_path, read_model
from splitfold.runtime.target import Target

__all__ = ["calibrate_target_command"]

_SHOWN = 12
"""Shapes of an operation that are shown."""


def calibrate_target_command(
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE.json", help="Where the times go; what it holds already is kept."
        ),
    ],
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="MODEL.onnx", help="Measure what this model needs, and no more."),
    ] = None,
    data: DataOption = None,
    batch: BatchOption = 1,
    target: Annotated[str, typer.Option("--target", metavar="NAME", help="What is measured: cpu.")] = "cpu",
    threads: ThreadsOption = 0,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.01, help="Time for all forms of one operation at one shape.")
    ] = 0.4,
    again: Annotated[bool, typer.Option("--again", help="Measure anew what the file holds already.")] = False,
    debug: DebugOption = False,
) -> None:
    """Measure what the kernels of this machine take: float, int8, blocks of 2, 4 and 8 bits, fused and not.

    Without --model the shapes of common networks are measured, in about a minute; with it the model's own,
    in seconds. Times of a shape in between are interpolated. A second call measures only what is missing.
    Nothing is written where it is interrupted.

    \b
    Example:
      splitfold calibrate-target -o target.json --model model.onnx --data inputs.npz --batch 8
      splitfold compile model.onnx -o out --target target.json
    """
    place, here = parse_target(target), Machine.here(threads)
    cases = list(common_cases()) if model is None else _own_cases(model, data, batch, place)
    known = known_costs(output, here)
    meter = SessionMeter(place, threads=threads, seconds=seconds)
    found = _measured(KernelCosts(here, {}) if again else known, cases, meter)
    costs = known.with_samples(found.costs.samples)
    _print(found, costs, cases)
    write_costs(costs, output)
    say("written", output)


def _own_cases(model: Path, data: str | None, batch: int, place: Target) -> list[Case]:
    """Return what the model needs measured, and print what is not known of it."""
    read = read_model(model_path(model))
    feeds, words = open_data(data, read, batch=batch)
    cases, unknown = model_cases(read, first_feeds(feeds), place)
    say("shapes", f"of {model} on {words}")
    if unknown:
        say("unknown", f"the shapes of {', '.join(unknown)}")
    return cases


def _measured(known: KernelCosts, cases: Sequence[Case], meter: SessionMeter) -> CostsMeasured:
    """Measure what is not known, behind a bar."""
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=errors(),
        transient=True,
        disable=not errors().is_terminal,
    ) as progress:
        bar = progress.add_task("shapes", total=None)

        def tell(done: int, total: int, what: str) -> None:
            progress.update(bar, description=what, completed=done, total=total)

        return measure_costs(known, cases, meter, tell=tell)


def _print(found: CostsMeasured, costs: KernelCosts, cases: Sequence[Case]) -> None:
    machine = costs.machine
    say("machine", f"{machine.processor}, {machine.cores} cores, ONNX Runtime {machine.runtime}")
    say("measured", f"{found.measured} kernels at shapes; {found.known} were known")
    for case, reason in found.failed.items():
        out().print(f"  does not run here: {case}: {reason}", soft_wrap=True)
    for operation in Operation:
        rows = _rows([case for case in cases if case.kernel.operation is operation], costs)
        if rows:
            axes = " x ".join(AXES[operation])
            table((f"{operation.value}: {axes}", "fp32 ms#", "fastest", "ms#", "slowest", "ms#"), rows)


def _rows(cases: Sequence[Case], costs: KernelCosts) -> list[tuple[str, ...]]:
    """Return, by shape, what float takes, and the fastest and the slowest form."""
    shapes = list(dict.fromkeys(case.shape for case in cases))
    rows: list[tuple[str, ...]] = []
    for shape in shapes[:_SHOWN]:
        times = {
            case.kernel: costs.samples[case].milliseconds
            for case in cases
            if case.shape == shape and case in costs.samples
        }
        if times:
            first, *_, last = sorted([*times, *times], key=times.__getitem__)
            plain = times.get(Kernel(first.operation))
            rows.append(
                (
                    "x".join(map(str, shape)),
                    "-" if plain is None else f"{plain:.4f}",
                    _form(first),
                    f"{times[first]:.4f}",
                    _form(last),
                    f"{times[last]:.4f}",
                )
            )
    if len(shapes) > _SHOWN:
        rows.append((f"{len(shapes) - _SHOWN} more in the file", *[""] * 5))
    return rows


def _form(kernel: Kernel) -> str:
    return str(kernel).partition("/")[2]
