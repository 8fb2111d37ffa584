# SPDX-License-Identifier: Apache-2.0
"""The application: its commands, and what ``splitfold --help`` says."""

from __future__ import annotations

from typing import Annotated

import typer

from splitfold.compiler.cli.bench_command import bench_command
from splitfold.compiler.cli.bisect_command import bisect_command
from splitfold.compiler.cli.calibrate_target_command import calibrate_target_command
from splitfold.compiler.cli.compare_command import compare_command
from splitfold.compiler.cli.compile_command import COMPILE_HELP, compile_command
from splitfold.compiler.cli.demo_command import demo_command
from splitfold.compiler.cli.diff_command import diff_command
from splitfold.compiler.cli.drift_command import drift_command
from splitfold.compiler.cli.explain_command import explain_command
from splitfold.compiler.cli.group import Commands
from splitfold.compiler.cli.inspect_command import inspect_command
from splitfold.compiler.cli.opt_command import opt_command
from splitfold.compiler.cli.outliers_command import outliers_command
from splitfold.compiler.cli.output import out
from splitfold.compiler.cli.passes_command import passes_command
from splitfold.compiler.cli.plan_command import PLAN_HELP, plan_command
from splitfold.compiler.cli.profile_command import profile_command
from splitfold.compiler.cli.replay_command import replay_command
from splitfold.compiler.cli.report_command import report_command
from splitfold.compiler.cli.reproduce_command import reproduce_command
from splitfold.compiler.manifest import installed_version

__all__ = ["app"]

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _version(value: bool) -> None:
    if value:
        out().print(f"splitfold {installed_version('splitfold')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compile PyTorch and ONNX models into smaller, faster, verified ONNX models for plain ONNX Runtime.

    \b
    First steps:
      splitfold demo                                        see it work, offline, in half a minute
      splitfold compile model.onnx -o out --preset int4     compile a model of yours
      splitfold inspect out                                 look at what came out
      splitfold bench model.onnx out                        and at how fast it is

    Exit codes: 0 done, 1 the work failed (one block on standard error says why), 2 the command line is wrong.
    """


app.command("compile", help=COMPILE_HELP)(compile_command)
app.command("opt")(opt_command)
app.command("passes")(passes_command)
app.command("plan", help=PLAN_HELP)(plan_command)
app.command("inspect")(inspect_command)
app.command("compare")(compare_command)
app.command("diff")(diff_command)
app.command("drift")(drift_command)
app.command("outliers")(outliers_command)
app.command("explain")(explain_command)
app.command("bench")(bench_command)
app.command("profile")(profile_command)
app.command("calibrate-target")(calibrate_target_command)
app.command("replay")(replay_command)
app.command("report")(report_command)
app.command("bisect")(bisect_command)
app.command("reproduce")(reproduce_command)
app.command("demo")(demo_command)
