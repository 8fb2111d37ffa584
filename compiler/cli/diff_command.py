# SPDX-License-Identifier: Apache-2.0
"""``splitfold diff``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from splitfold.compiler.cli.diff_text import layer_texts
from splitfold.compiler.cli.group import usage
from splitfold.compiler.cli.options import DebugOption
from splitfold.compiler.cli.output import megabytes, out, say
from splitfold.compiler.debug.diff.graph_diff import GraphDiff, diff
from splitfold.compiler.debug.diff.types import Slot, SlotChange
from splitfold.runtime.model_file import model_path, read_model

__all__ = ["diff_command"]


def diff_command(
    before: Annotated[
        Path,
        typer.Argument(metavar="A", help="The first model: an .onnx file, a snapshot, an artifact folder."),
    ],
    after: Annotated[Path, typer.Argument(metavar="B", help="The model that is compared with it.")],
    layer: Annotated[
        str | None,
        typer.Option("--layer", metavar="PATTERN", help="Only layers of this name (shell wildcards)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: every change, none grouped.")] = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 1 where they differ.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Tell each layer by itself, with names.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Show what is different in B, by user layer: nodes, attributes, types, wiring, and weights by how much.

    Counterparts are found by the value that they stand for, so that a fused or split layer meets its
    ancestors; codes are turned back into numbers before they are compared. Equal changes of several layers
    are told once. Names of nodes and inner values do not count as a difference.

    Exits with 0 also where the models differ, unless --exit-code is given.

    \b
    Example:
      splitfold diff model.onnx out --layer '*.query'
    """
    found = diff(read_model(model_path(before)), read_model(model_path(after)))
    with usage("--layer"):
        chosen = found if layer is None else found.only(layer)
    if as_json:
        values = {"before": str(before), "after": str(after), **chosen.to_json()}
        typer.echo(json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False))
    else:
        _print(chosen, whole=found, verbose=verbose)
    if exit_code and not found.equal:
        raise typer.Exit(1)


def _print(chosen: GraphDiff, *, whole: GraphDiff, verbose: bool) -> None:
    if whole.equal:
        out().print("the models are equal: the same operators, wiring, types and weights", soft_wrap=True)
        return
    _print_summary(whole)
    for slot in chosen.slots:
        out().print(_slot(slot), soft_wrap=True)
    if not chosen.layers and chosen is not whole:
        out().print("nothing is different in these layers")
    for line in layer_texts(chosen.layers, verbose=verbose):
        out().print(line, soft_wrap=True)


def _print_summary(found: GraphDiff) -> None:
    s = found.summary
    say(
        "nodes",
        f"{s.nodes[0]} -> {s.nodes[1]}: {s.nodes_replaced} replaced, {s.nodes_added} added, "
        f"{s.nodes_removed} removed, {s.nodes_changed} changed",
    )
    renamed = f", {s.tensors_renamed} renamed only" if s.tensors_renamed else ""
    say(
        "tensors",
        f"{s.tensors[0]} -> {s.tensors[1]}: {s.tensors_changed} changed, {s.tensors_added} added, "
        f"{s.tensors_removed} removed{renamed}",
    )
    was, now = s.weight_bytes
    share = f" ({100 * now / was:.0f} %)" if was and was != now else ""
    say("weights", f"{megabytes(was)} -> {megabytes(now)}{share}")


def _slot(change: SlotChange) -> Text:
    name = f"{change.slot.value} {change.name}"
    gap = " " if change.slot is Slot.OPSET else ": "
    if change.before is None:
        return Text(f"+ {name}{gap}{change.after}", style="green")
    if change.after is None:
        return Text(f"- {name}{gap}{change.before}", style="red")
    return Text(f"{name}{gap}{change.before} -> {change.after}", style="yellow")
