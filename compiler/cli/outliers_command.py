# SPDX-License-Identifier: Apache-2.0
"""``splitfold outliers``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from splitfold.compiler.cli.compare_command import DataOption
from splitfold.compiler.cli.data import open_data
from splitfold.compiler.cli.options import DebugOption
from splitfold.compiler.cli.output import out, table
from splitfold.compiler.debug.outliers.measurement import measure_outliers
from splitfold.compiler.debug.outliers.picture import outliers_picture
from splitfold.compiler.debug.outliers.results import Outliers
from splitfold.runtime.model_file import model_path, read_model
from splitfold.runtime.padding import PADDING

__all__ = ["outliers_command"]

_TOP = 12


def outliers_command(
    path: Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx file or an artifact folder.")],
    data: DataOption = None,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE", help="SVG file to draw all layers and heads in."),
    ] = None,
    delimiter: Annotated[
        list[int] | None,
        typer.Option("--delimiter", metavar="ID", help="Token id that separates, such as [SEP]; repeat it."),
    ] = None,
    padding: Annotated[
        str,
        typer.Option(
            "--padding",
            metavar="INPUT",
            help="Input whose zeros mark positions to leave out, where the model has it; 'none' keeps all.",
        ),
    ] = PADDING,
    everything: Annotated[bool, typer.Option("--all", help="Show every layer, in order.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print every number as JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """Show where a model's activations have outliers, which grids of one scale cannot hold, and why.

    For each layer: the infinity norm (mean over samples of the largest magnitude) and the kurtosis (3 for a
    normal distribution). For each attention block: the share of probability on the first token and on
    delimiters, where heads look that want to do nothing, and the share of exact zeros. Large values there are
    what clip-softmax and gate-attention, with training, do away with; fold-scales moves them into weights.

    \b
    Examples:
      splitfold outliers model.onnx --data held_out.npz --picture outliers.svg
      splitfold outliers model.onnx --data held_out.npz --delimiter 101 --delimiter 102
    """
    model = read_model(model_path(path))
    batches, words = open_data(data, model)
    found = measure_outliers(
        model, batches, padding=None if padding == "none" else padding, delimiters=delimiter or ()
    )
    if picture is not None:
        picture.write_text(outliers_picture(found, str(path)), encoding="utf-8")
    if as_json:
        out().print(json.dumps(found.to_json(), indent=1), soft_wrap=True)
        return
    _say(f"{path}: {found.samples} samples of {words}")
    if found.padding is not None:
        _say(f"left out: positions where '{found.padding}' is 0 (--padding none keeps them)")
    _say(f"largest infinity norm {found.infinity_norm:.4g}, mean kurtosis {found.kurtosis:.4g}")
    _print_layers(found, everything)
    _print_attention(found)
    if picture is not None:
        _say(f"drawn in {picture}")


def _print_layers(found: Outliers, everything: bool) -> None:
    layers = list(found.by_layer().values())
    shown = layers if everything else sorted(layers, key=lambda it: -it.infinity_norm)[:_TOP]
    rows = [
        (it.layer, it.what, f"{it.infinity_norm:.4g}", f"{it.largest:.4g}", f"{it.kurtosis:.4g}")
        for it in shown
    ]
    table(("layer", "value", "infinity norm#", "largest#", "kurtosis#"), rows)
    if len(shown) < len(layers):
        _say(f"{len(layers) - len(shown)} layers with less (--all shows them)")


def _print_attention(found: Outliers) -> None:
    rows = [
        (
            block.layer,
            f"{block.first:.1%}",
            f"{max(block.heads, default=0.0):.1%}",
            "" if block.delimiters is None else f"{block.delimiters:.1%}",
            f"{block.zeros:.1%}",
        )
        for block in found.attention
    ]
    if rows:
        table(("attention", "first token#", "its largest head#", "delimiters#", "zeros#"), rows)
    for layer, reason in found.unseen:
        _say(f"not seen: {layer}: {reason}")


def _say(text: str) -> None:
    out().print(text, soft_wrap=True)
