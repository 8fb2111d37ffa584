# SPDX-License-Identifier: Apache-2.0
"""Options on where the reproducer of a failure goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splitfold.compiler.debug.reproduce import reproducer

__all__ = ["NoReproducerOption", "ReproducersOption", "reproducers_in"]

ReproducersOption = Annotated[
    Path | None,
    typer.Option(
        "--reproducers",
        metavar="DIR",
        help="Where a failure writes the smallest part of the model that still fails "
        "(default: splitfold-reproducers in the folder for temporary files).",
    ),
]
NoReproducerOption = Annotated[
    bool, typer.Option("--no-reproducer", help="Write none: a failure ends at once.")
]


def reproducers_in(folder: Path | None, none: bool) -> Path | None:
    """Return the folder of ``--reproducers``, or None for ``--no-reproducer``.

    Raises:
        typer.BadParameter: both were given.
    """
    if none and folder is not None:
        raise typer.BadParameter("give one of them, not both.", param_hint="--reproducers / --no-reproducer")
    return None if none else folder or reproducer.REPRODUCERS
