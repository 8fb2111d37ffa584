# SPDX-License-Identifier: Apache-2.0
"""``splitfold report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splitfold.compiler.cli.compare_command import DataOption
from splitfold.compiler.cli.options import DebugOption, VerboseOption
from splitfold.compiler.cli.output import errors, file_bytes, megabytes, say
from splitfold.compiler.debug.report import check_report, reopen
from splitfold.compiler.locate import locate_data, locate_model

__all__ = ["report_command"]


def report_command(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="An artifact folder, or an .onnx file of splitfold.")
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model", metavar="MODEL", help="The original: an .onnx file or package.module:function."
        ),
    ],
    data: DataOption = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE.html", help="The file to write (replaced if there)."),
    ] = Path("report.html"),
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a report of a compiled model: one HTML file that opens in any browser, without a network.

    It shows size and precision by layer, what each pass did and why it left the rest, the drift along the
    depth, the worst layers with their grids, and the graph around any layer before and after. Both models are
    run on a few batches of DATA. Needs the extra: pip install 'splitfold[report]'. With compile --report the
    same comes out of a compilation, with the times of its passes.

    \b
    Example:
      splitfold report out --model model.onnx --data held_out.npz -o report.html
    """
    check_report(output)
    compiled = reopen(artifact, locate_model(model), None if data is None else locate_data(data))
    with errors().status("running both models, layer by layer"):
        compiled.write_report(output)
    say("written", f"{output}, {megabytes(file_bytes(output))}")
