# SPDX-License-Identifier: Apache-2.0
"""``splitfold explain``."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from splitfold.compiler.cli.compare_command import DataOption
from splitfold.compiler.cli.group import usage
from splitfold.compiler.cli.options import DebugOption
from splitfold.compiler.cli.output import megabytes, out, say, table
from splitfold.compiler.debug.drift.measurement import Drift, drift
from splitfold.compiler.debug.explain.explanation import Explanation, LayerExplanation, Totals, explain
from splitfold.compiler.debug.explain.layer_steps import Action
from splitfold.compiler.debug.explain.near_patterns import PatternFit
from splitfold.compiler.debug.explain.storage import Storage
from splitfold.compiler.locate import locate_data
from splitfold.runtime.artifact import Artifact, read_manifest
from splitfold.runtime.errors import ArtifactError
from splitfold.runtime.model_file import read_model

__all__ = ["explain_command"]

_NODES_SHOWN = 4


def explain_command(
    artifact: Annotated[
        Path,
        typer.Argument(metavar="ARTIFACT", help="An artifact folder, or an .onnx file that splitfold wrote."),
    ],
    layer: Annotated[
        str | None,
        typer.Argument(
            metavar="LAYER",
            help="A layer, a pattern such as 'encoder.*.dense', or a node's name; all without.",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", help="What it was compiled from: measures the local error where no pass did."
        ),
    ] = None,
    data: DataOption = None,
    everything: Annotated[
        bool, typer.Option("--all", help="List layers without weights one by one too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
    debug: DebugOption = False,
) -> None:
    """Say what became of each layer and why: which passes took it or left it, its precision, bits and error.

    \b
    Example:
      splitfold explain out
      splitfold explain out encoder.layer.0.output.dense
    """
    read = _read(artifact)
    found = explain(read, drift=None if model is None else _drift(model, read, data))
    if layer is None:
        chosen: Sequence[LayerExplanation] = found.layers
    else:
        with usage("LAYER"):
            chosen = found.find(layer)
    if as_json:
        typer.echo(json.dumps(_values(found, chosen), indent=1))
    elif layer is None:
        _print_all(found, everything)
    else:
        for item in chosen:
            _print_layer(item)


def _read(place: Path) -> Artifact:
    if place.is_dir():
        return Artifact.load(place)
    model = read_model(place)
    try:
        return Artifact(model, read_manifest(place))
    except ArtifactError as error:
        raise ArtifactError(f"{error} `splitfold inspect {place}` shows what it holds.") from error


def _drift(model: Path, artifact: Artifact, data: str | None) -> Drift:
    return drift(model, artifact, None if data is None else locate_data(data), suspects=0)


# --- one layer ---


def _print_layer(item: LayerExplanation) -> None:
    out().print(f"\n{item.name}", style="bold", soft_wrap=True)
    _line("precision", item.precision)
    _line("operators", ", ".join(f"{name} {count}" for name, count in item.operators.items()))
    if item.kernel:
        _line("kernel", f"{item.kernel} reads its weight")
    if item.local_db is not None:
        recorded = any(step.measured_db == item.local_db for step in item.steps)
        when = "as recorded" if recorded else "measured now"
        _line("local error", f"{_decibel(item.local_db)} dB SQNR of its own output, {when}")
    if item.reason:
        _line("in float" if item.precision != "8-bit" else "why", item.reason)
    if len(item.weights) > 1 and item.bits is not None and any(weight.branch for weight in item.weights):
        _line("bits", f"{item.bits:.2f} bits a weight stored in {len(item.weights)} branches together")
    for weight in item.weights:
        _print_weight(weight)
    for fit in item.patterns:
        _line("pattern", str(fit))
    out().print("  what each pass did")
    for step in item.steps:
        taken = step.action is Action.APPLIED and step.measured_db is not None
        measured = f" ({_decibel(step.measured_db or 0.0)} dB on calibration data)" if taken else ""
        out().print(f"    {step.name:<22}{step.action.value}: {step.text}{measured}", soft_wrap=True)
    _print_notes(item)


def _line(name: str, text: str) -> None:
    out().print(f"  {name:<11} {text}", soft_wrap=True)


def _print_weight(weight: Storage) -> None:
    bits = f"{weight.bits:.2f} bits a weight stored ({weight.elements:,} weights"
    parts = [("codes", weight.codes - weight.padding), ("scales", weight.scales)]
    parts += [("zero points", weight.zero_points), ("padding", weight.padding)]
    shares = [f"{name} {8 * size / weight.elements:.2f}" for name, size in parts if size]
    bias = f"; bias {weight.bias:,} bytes" if weight.bias else ""
    _line(weight.branch or "bits", f"{bits}: {' + '.join(shares)}){bias}")
    if weight.scale_range is not None:
        low, high = weight.scale_range
        block = f", one for {weight.block} weights" if weight.block is not None else ""
        _line("scales", f"{weight.scale_count} of {low:.3g} .. {high:.3g}{block}")
    if weight.activation is not None:
        grid = weight.activation
        _line("activations", f"scale {grid.scale:.6g}, zero point {grid.zero_point}")


def _print_notes(item: LayerExplanation) -> None:
    if not item.notes:
        return
    out().print("  its nodes without a low-bit weight")
    for note in item.notes:
        nodes = ", ".join(f"'{name}'" for name in note.nodes[:_NODES_SHOWN])
        more = f", and {len(note.nodes) - _NODES_SHOWN} more" if len(note.nodes) > _NODES_SHOWN else ""
        why = note.reason.why or item.reason
        around = f"; {note.reason.around}" if note.reason.around else ""
        out().print(f"    {note.operator} {nodes}{more}: {why}{around}", soft_wrap=True)


# --- all layers ---


def _print_all(found: Explanation, everything: bool) -> None:
    say("pipeline", found.pipeline)
    for step in found.model_steps:
        say("whole model", f"{step.name} {step.action.value}: {step.text}")
    shown = [item for item in found.layers if everything or item.weights or _is_touched(item)]
    rows = [
        (
            item.name,
            item.precision,
            item.kernel or "-",
            "-" if item.bits is None else f"{item.bits:.2f}",
            "-" if item.local_db is None else _decibel(item.local_db),
            item.reason,
        )
        for item in shown
    ]
    table(("layer", "precision", "kernel", "bits a weight#", "local dB#", "why it is in float"), rows)
    with_weights = [item for item in found.layers if item.weights]
    precisions = Counter(item.precision for item in with_weights).most_common()
    counts = ", ".join(f"{count} {precision}" for precision, count in precisions)
    out().print(f"{len(with_weights)} layers with weights: {counts or '-'}", soft_wrap=True)
    _print_rest([item for item in found.layers if item not in shown])
    _print_patterns(found.layers)
    _print_totals(found.totals)


def _is_touched(item: LayerExplanation) -> bool:
    return any(step.lossy and step.action is not Action.NO_CANDIDATE for step in item.steps)


def _print_rest(rest: Sequence[LayerExplanation]) -> None:
    """Print how many layers without weights there are, by reason."""
    if not rest:
        return
    out().print(f"{len(rest)} layers without weights (--all lists them)")
    for precision, count in Counter(item.precision for item in rest).most_common():
        words = {
            "float": "in float: no weight to hold in few bits",
            "indices": "compute indices, shapes or flags",
            "8-bit": "between integer layers, in 8 bits",
        }
        out().print(f"  {count} {words[precision]}")


def _print_patterns(layers: Iterable[LayerExplanation]) -> None:
    fits = list(dict.fromkeys(fit for item in layers for fit in item.patterns))
    counts: dict[str, list[PatternFit]] = {}
    for fit in fits:
        counts.setdefault(str(fit).partition(" at '")[0], []).append(fit)
    for text, found in counts.items():
        first = found[0].nodes[0].name
        out().print(f"{len(found)} x {text} (such as the one that ends in '{first}')", soft_wrap=True)


def _print_totals(totals: Totals) -> None:
    held = totals.codes + totals.scales + totals.zero_points
    bits = f"{8 * held / totals.elements:.2f}" if totals.elements else "-"
    say(
        "weights",
        f"{totals.elements:,} in {megabytes(held)}, {bits} bits each: codes {megabytes(totals.codes)}"
        f"{f' (padding {megabytes(totals.padding)})' if totals.padding else ''}, scales "
        f"{megabytes(totals.scales)}, zero points {megabytes(totals.zero_points)}; biases "
        f"{megabytes(totals.bias)}, other constants {megabytes(totals.other)}",
    )


def _decibel(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.1f}"


# --- JSON ---


def _values(found: Explanation, chosen: Iterable[LayerExplanation]) -> dict[str, Any]:
    return {
        "pipeline": found.pipeline,
        "totals": vars(found.totals),
        "layers": [_layer_values(item) for item in chosen],
    }


def _layer_values(item: LayerExplanation) -> dict[str, Any]:
    return {
        "layers": list(item.layers),
        "operators": item.operators,
        "precision": item.precision,
        "kernel": item.kernel or None,
        "bits_per_weight": item.bits,
        "local_db": _plain(item.local_db),
        "reason": item.reason or None,
        "weights": [_weight_values(weight) for weight in item.weights],
        "steps": [
            {
                "pass": step.name,
                "action": step.action.value,
                "text": step.text,
                "measured_db": _plain(step.measured_db),
            }
            for step in item.steps
        ],
        "nodes": [
            {
                "operator": note.operator,
                "nodes": list(note.nodes),
                "why": note.reason.why or item.reason,
                "around": note.reason.around or None,
            }
            for note in item.notes
        ],
        "patterns": [str(fit) for fit in item.patterns],
    }


def _weight_values(weight: Storage) -> dict[str, Any]:
    values = {name: value for name, value in vars(weight).items() if name not in ("node", "activation")}
    grid = None if weight.activation is None else vars(weight.activation)
    return {**values, "bits_per_weight": weight.bits, "activation": grid}


def _plain(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)
