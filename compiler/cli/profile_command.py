# SPDX-License-Identifier: Apache-2.0
"""``splitfold profile``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from splitfold.compiler.cli.compare_command import DataOption
from splitfold.compiler.cli.data import open_data
from splitfold.compiler.cli.options import DebugOption, first_feeds
from splitfold.compiler.cli.output import out, table
from splitfold.compiler.cli.run_options import BatchOption, RunsOption, ThreadsOption
from splitfold.compiler.debug.profile.times import ModelTime, Profile, ProfileRow, RowTime, profile
from splitfold.runtime.model_file import model_path, read_model

__all__ = ["profile_command"]

_PARTS = 3
"""Layers of a row that are named; a kernel rarely computes more."""
_OPERATORS = 12


def profile_command(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="An .onnx file or an artifact folder.")],
    other: Annotated[
        Path | None,
        typer.Argument(metavar="OTHER", help="A second one, shown beside it: what PATH became."),
    ] = None,
    data: DataOption = None,
    batch: BatchOption = 1,
    threads: ThreadsOption = 0,
    runs: RunsOption = 30,
    top: Annotated[int, typer.Option("--top", min=1, help="Layers that are shown, the slowest first.")] = 25,
    everything: Annotated[
        bool, typer.Option("--all", help="Show every layer, in the order in which the model runs.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead, all layers in it.")] = False,
    debug: DebugOption = False,
) -> None:
    """Show where a model's time goes, by layer, with the operators that really run: those the runtime fused.

    With two models both are shown side by side, and each layer that became slower says what it runs as now.
    Times are medians over interleaved runs, by the runtime's own profiler.

    \b
    Example:
      splitfold profile model.onnx out --data inputs.npz --threads 2
    """
    models = [read_model(model_path(place)) for place in (path, other) if place is not None]
    feeds, words = open_data(data, models[0], batch=batch)
    example = first_feeds(feeds)
    found = profile(*models, feeds=example, runs=runs, threads=threads)
    if as_json:
        typer.echo(json.dumps(_values(found), indent=1))
        return
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in example.items())
    threading = f"{threads} threads" if threads else "default threads"
    out().print(f"{runs} runs{' each' if other else ''} on {words}: {shapes}; {threading}", soft_wrap=True)
    rows = found.rows if everything else sorted(found.rows, key=lambda row: -_longest(row))[:top]
    if other is not None:
        out().print(f"before: {path}\nafter:  {other}", soft_wrap=True)
    _print_rows(found, rows)
    _print_operators(found, everything)
    _print_slower(found)


def _longest(row: ProfileRow) -> float:
    return max(side.microseconds for side in (row.before, row.after) if side is not None)


def _print_rows(found: Profile, rows: Sequence[ProfileRow]) -> None:
    columns = ["layer", "ms#", "share#", "runs as"]
    if found.after is not None:
        columns = ["layer", "before ms#", "after ms#", "speed#", "before", "after"]
    lines = [_line(found, _name(row.layers), row) for row in rows]
    shown = {id(row) for row in rows}
    rest = [row for row in found.rows if id(row) not in shown]
    if rest:
        lines.append(_line(found, f"{len(rest)} more (--all)", _sum(rest)))
    for name, before, after in (
        ("all kernels", found.before.kernels_us, found.after.kernels_us if found.after else None),
        ("outside kernels", found.before.outside_us, found.after.outside_us if found.after else None),
    ):
        lines.append(_total(name, before, after, found))
    table(columns, lines)


def _line(found: Profile, name: str, row: ProfileRow) -> list[str]:
    before, after = row.before, row.after
    if found.after is None:
        spent = before.microseconds if before is not None else 0.0
        share = spent / found.before.kernels_us if found.before.kernels_us else 0.0
        return [name, _ms(before), f"{share:.1%}", before.named() if before is not None else ""]
    ratio = "-" if row.ratio is None else f"{row.ratio:.2f}x"
    ran = before.named() if before is not None else "-"
    return [name, _ms(before), _ms(after), ratio, ran, found.verdict(row) if row.layers else ""]


def _sum(rows: Sequence[ProfileRow]) -> ProfileRow:
    """Return one row that stands for `rows`, without operators."""
    sides = []
    for position in ("before", "after"):
        times = [side.microseconds for row in rows if (side := getattr(row, position)) is not None]
        sides.append(RowTime(sum(times), (), False) if times else None)
    return ProfileRow((), sides[0], sides[1])


def _total(name: str, before: float, after: float | None, found: Profile) -> list[str]:
    if after is None:
        total = found.before.kernels_us + found.before.outside_us
        share = f"{before / total:.1%} of a run" if name == "outside kernels" and total else ""
        return [name, f"{before / 1e3:.3f}", share, ""]
    ratio = f"{before / after:.2f}x" if after > 0 else "-"
    return [name, f"{before / 1e3:.3f}", f"{after / 1e3:.3f}", ratio, "", ""]


def _ms(time: RowTime | None) -> str:
    return "-" if time is None else f"{time.microseconds / 1e3:.3f}"


def _name(layers: Sequence[str]) -> str:
    """Return the names of a row: the first in full, the others without what they share with it."""
    if not layers:
        return "(no layer)"
    first = layers[0].split(".")
    parts = [layers[0]]
    for layer in layers[1:_PARTS]:
        words = layer.split(".")
        shared = 0
        while shared < min(len(words), len(first)) - 1 and words[shared] == first[shared]:
            shared += 1
        while shared and words[shared].isdigit():  # "layer1.0", not "0"
            shared -= 1
        parts.append(".".join(words[shared:]))
    more = len(layers) - _PARTS
    return " + ".join(parts) + (f" + {more} more" if more > 0 else "")


def _print_operators(found: Profile, everything: bool) -> None:
    before = {item.operator: item for item in found.before.operators}
    after = {item.operator: item for item in found.after.operators} if found.after else {}
    names = sorted(
        {*before, *after},
        key=lambda name: -max(side[name].microseconds for side in (before, after) if name in side),
    )
    columns = ["operator", "kernels#", "ms#"] + (["kernels now#", "ms now#"] if found.after else [])
    rows = []
    for name in names if everything else names[:_OPERATORS]:
        cells = [name]
        for side in (before, after) if found.after else (before,):
            item = side.get(name)
            cells += ["-", "-"] if item is None else [str(item.count), f"{item.microseconds / 1e3:.3f}"]
        rows.append(cells)
    if len(rows) < len(names):
        rows.append([f"{len(names) - len(rows)} more (--all)", *[""] * (len(columns) - 1)])
    table(columns, rows)


def _print_slower(found: Profile) -> None:
    """Say in one sentence each which of the layers became slower."""
    if found.after is None:
        return
    slower = [row for row in found.rows if "slower" in found.verdict(row)]
    if not slower:
        return
    lost = sum(_spent(row.after) - _spent(row.before) for row in slower) / 1e3
    won = sum(_spent(row.before) - _spent(row.after) for row in found.rows) / 1e3 + lost
    out().print(
        f"{len(slower)} of {len(found.rows)} rows became slower, by {lost:.3f} ms together; "
        f"the others gained {won:.3f} ms.",
        soft_wrap=True,
    )


def _spent(time: RowTime | None) -> float:
    return 0.0 if time is None else time.microseconds


def _values(found: Profile) -> dict[str, Any]:
    def whole(model: ModelTime | None) -> dict[str, Any] | None:
        return None if model is None else dataclasses.asdict(model)

    rows = [
        {**dataclasses.asdict(row), "ratio": row.ratio, "verdict": found.verdict(row) or None}
        for row in found.rows
    ]
    return {"before": whole(found.before), "after": whole(found.after), "rows": rows}
