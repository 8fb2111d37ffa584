# SPDX-License-Identifier: Apache-2.0
"""``splitfold bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splitfold.compiler.cli.compare_command import DataOption
from splitfold.compiler.cli.data import open_data
from splitfold.compiler.cli.options import DebugOption, TargetOption, first_feeds, parse_target
from splitfold.compiler.cli.output import file_bytes, megabytes, out, table
from splitfold.compiler.cli.run_options import BatchOption, RunsOption, ThreadsOption
from splitfold.compiler.cli.session_options import say_stored, stored_options
from splitfold.runtime.bench import bench
from splitfold.runtime.model_file import model_path, read_model

__all__ = ["bench_command"]


def bench_command(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="A [B ...]", help=".onnx files or artifact folders with the same inputs."),
    ],
    data: DataOption = None,
    batch: BatchOption = 1,
    threads: ThreadsOption = 0,
    runs: RunsOption = 50,
    target: TargetOption = "cpu",
    debug: DebugOption = False,
) -> None:
    """Time models side by side: they take turns, and medians and ratios to the first are shown.

    An artifact is opened with the session options that its manifest names.

    \b
    Example:
      splitfold bench model.onnx out-int8 out-int4 --data inputs.npz --threads 2 --runs 100
    """
    place = parse_target(target)
    files = [model_path(model) for model in models]
    read = [read_model(file) for file in files]
    feeds, words = open_data(data, read[0], batch=batch)
    example = first_feeds(feeds)
    options = [place.options.joined(stored_options(model)) for model in models]
    timings = bench(files, example, runs=runs, threads=threads, target=place, options=options)
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in example.items())
    out().print(
        f"{runs} runs each on {words}: {shapes}; {f'{threads} threads' if threads else 'default threads'}; "
        f"target {place.name}",
        soft_wrap=True,
    )
    for model, its in zip(models, options, strict=True):
        say_stored(model, its)
    rows = [
        (
            model,
            f"{t.median_ms:.3f}",
            f"{t.low_ms:.3f} .. {t.high_ms:.3f}",
            f"{t.ratio:.2f}x",
            megabytes(file_bytes(file)),
        )
        for model, file, t in zip(models, files, timings, strict=True)
    ]
    table(("model", "median ms#", "10 % .. 90 %#", "speed to the first#", "file#"), rows)
