# SPDX-License-Identifier: Apache-2.0
"""Options on how fast a result must be, and what was found, as text."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from splitfold.compiler import driver
from splitfold.compiler.cli.group import usage
from splitfold.compiler.cli.output import out, say
from splitfold.compiler.speed.options import IfSlower, SpeedCheck
from splitfold.compiler.speed.outcome import Speed
from splitfold.passes.errors import SpecError
from splitfold.runtime.errors import did_you_mean

__all__ = ["IfSlowerOption", "SpeedSecondsOption", "parse_speed", "say_speed"]

_OFF = "off"
_SHOWN = 8
"""Layers that are named without ``-v``."""

IfSlowerOption = Annotated[
    str,
    typer.Option(
        "--if-slower",
        metavar="CHOICE",
        help="Where the result is slower than MODEL, timed on the example inputs: slower layers of a preset "
        "go to dynamic int8 or back to float (preset), those of any pipeline do (repair), it stays, with a "
        "warning (keep), or nothing is timed (off).",
    ),
]
SpeedSecondsOption = Annotated[
    float, typer.Option("--speed-seconds", metavar="S", min=0.01, help="Time of each such comparison.")
]


def parse_speed(word: str, seconds: float) -> SpeedCheck | None:
    """Return the check of ``--if-slower`` and ``--speed-seconds``, or None for ``off``.

    Raises:
        typer.BadParameter: there is no such choice.
    """
    words = [*(choice.value for choice in IfSlower), _OFF]
    with usage("--if-slower"):
        if word not in words:
            raise SpecError(f"unknown choice '{word}'.{did_you_mean(word, words)} Known: {', '.join(words)}.")
    if word == _OFF:
        return None
    return dataclasses.replace(driver.SPEED_CHECK, if_slower=IfSlower(word), seconds=seconds)


def say_speed(found: Speed | None, *, verbose: bool) -> None:
    """Print how fast the result is, which layers made it slower, and what was done about it."""
    if found is None:
        return
    say("speed", found.statement)
    if found.slow:
        shown = found.slow if verbose else found.slow[:_SHOWN]
        what = "the pipeline's own result" if found.changed else "it"
        out().print(f"  slower layers of {what}:")
        for item in shown:
            name = "+".join(item.layers)
            out().print(
                f"    {name}: {item.before_us / 1e3:.3f} > {item.after_us / 1e3:.3f} ms as {item.runs_as}",
                soft_wrap=True,
            )
        if len(shown) < len(found.slow):
            out().print(f"    and {len(found.slow) - len(shown)} more (-v)")
    told = (
        ("to dynamic int8", found.in_int8),
        ("back to float", found.put_back),
        ("left out", found.left_out),
    )
    for what, names in told:
        if names:
            out().print(f"  {what}: {_joined(names, verbose)}", soft_wrap=True)


def _joined(names: tuple[str, ...], verbose: bool) -> str:
    if verbose or len(names) <= _SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[:_SHOWN])}, and {len(names) - _SHOWN} more (-v)"
