# SPDX-License-Identifier: Apache-2.0
"""``splitfold compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splitfold.compiler.cli.data import open_data
from splitfold.compiler.cli.options import (
    DebugOption,
    TargetOption,
    ToleranceOption,
    parse_target,
    parse_tolerance,
)
from splitfold.compiler.cli.output import out, table
from splitfold.compiler.cli.session_options import stored_options
from splitfold.runtime.model_file import model_path, read_model
from splitfold.runtime.session import Session
from splitfold.runtime.side_by_side import compare_sessions

__all__ = ["DataOption", "compare_command"]

DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DATA",
        help="Inputs: an .npz, a folder of .npz batches, or package.module:function.",
    ),
]


def compare_command(
    reference: Annotated[
        Path, typer.Argument(metavar="A", help="The reference: an .onnx file or an artifact folder.")
    ],
    actual: Annotated[Path, typer.Argument(metavar="B", help="The model that is compared with it.")],
    data: DataOption = None,
    tolerance: ToleranceOption = None,
    target: TargetOption = "cpu",
    debug: DebugOption = False,
) -> None:
    """Run two models on the same inputs and show how far B's outputs are from A's, over all batches.

    A runs on the CPU provider, B on the target and with the session options of its manifest. With --tolerance
    a difference beyond it exits with 1.

    \b
    Example:
      splitfold compare model.onnx out --data held_out.npz
    """
    limits, place = parse_tolerance(tolerance), parse_target(target)
    first = read_model(model_path(reference))
    read_model(model_path(actual))
    batches, words = open_data(data, first)
    options = place.options.joined(stored_options(actual))
    sessions = Session(model_path(reference)), Session(model_path(actual), place.with_options(options))
    deviations, count = compare_sessions(*sessions, batches)
    out().print(
        f"{actual} against {reference} over {count} batch{'es' if count != 1 else ''} of {words}",
        soft_wrap=True,
    )
    rows = [
        (
            name,
            f"{d.cosine:.6f}",
            f"{d.sqnr_db:.1f}",
            f"{d.max_abs:.4g}",
            f"{d.relative:.4g}",
            "-" if d.top1 is None else f"{d.top1:.4f}",
        )
        for name, d in deviations.items()
    ]
    table(("output", "cosine#", "SQNR dB#", "max abs#", "relative#", "top-1#"), rows)
    if limits is not None:
        limits.check(deviations, "")
