# SPDX-License-Identifier: Apache-2.0
"""``splitfold reproduce``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splitfold.compiler.cli.options import DebugOption
from splitfold.compiler.cli.output import out, say
from splitfold.compiler.debug.reproduce.rerun import Outcome, Reproduction, reproduce

__all__ = ["reproduce_command"]

_VERDICTS = {
    Outcome.SAME: "STILL FAILS, in the same way",
    Outcome.OTHER: "FAILS IN ANOTHER WAY than recorded",
    Outcome.GONE: "does not fail any more",
}


def reproduce_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What a failed compilation wrote.")],
    debug: DebugOption = False,
) -> None:
    """Run the reproducer of a failure, and say whether it still fails.

    A compilation that fails in a pass, in the runtime or in verification names the folder: it holds the
    smallest part of the model that was found to fail in the same way, its inputs, the passes, and a script,
    repro.py, that shows the failure without this command.

    Exits with 1 while it fails, and with 0 when it does not any more. Pass classes of your own are imported
    from where they were.

    \b
    Example:
      splitfold reproduce /tmp/splitfold-reproducers/splitfold-1f2e3d4c
    """
    found = reproduce(folder)
    _print(found)
    if found.outcome is not Outcome.GONE:
        raise typer.Exit(1)


def _print(found: Reproduction) -> None:
    facts = found.facts
    say("pipeline", facts["pipeline"])
    say("model", f"{found.nodes} nodes" if found.nodes != 1 else "1 node")
    for note in facts.get("notes", []):
        say("", note)
    for version in found.versions:
        say("version", version)
    say("result", _VERDICTS[found.outcome])
    if found.error is not None:
        out().print(f"\n{type(found.error).__name__}: {found.error}", soft_wrap=True)
    if found.outcome is not Outcome.SAME:
        out().print(f"\nrecorded was\n{facts.get('error')}: {facts.get('message')}", soft_wrap=True)
