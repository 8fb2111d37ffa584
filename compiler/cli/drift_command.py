# SPDX-License-Identifier: Apache-2.0
"""``splitfold drift``."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from splitfold.compiler.cli.compare_command import DataOption
from splitfold.compiler.cli.data import open_data
from splitfold.compiler.cli.options import DebugOption
from splitfold.compiler.cli.output import out
from splitfold.compiler.debug.drift.measurement import Drift, Point, drift
from splitfold.compiler.debug.drift.padding import PADDING
from splitfold.runtime.compare import Deviation
from splitfold.runtime.model_file import model_path, read_model

__all__ = ["drift_command"]

_WIDTH = 110
_LAYER = 48
_TOP = 10
_NUMBERS = ("local dB", "accum. dB", "cosine", "impact dB")


def drift_command(
    reference: Annotated[
        Path, typer.Argument(metavar="REFERENCE", help="The original: an .onnx file or an artifact folder.")
    ],
    compiled: Annotated[
        Path,
        typer.Argument(
            metavar="COMPILED",
            help="What was made from it, by splitfold or by any tool that keeps the names of values.",
        ),
    ],
    data: DataOption = None,
    layer: Annotated[
        list[str] | None,
        typer.Option("--layer", metavar="PATTERN", help="Only matching layers, such as 'encoder.layer.3.*'."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every value as JSON.")] = False,
    padding: Annotated[
        str,
        typer.Option(
            "--padding",
            metavar="INPUT",
            help="Input whose zeros mark positions to leave out, where the models have it; 'none' keeps all.",
        ),
    ] = PADDING,
    everything: Annotated[
        bool, typer.Option("--all", help="Show every value, in order of dependency.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Find the layers where a compiled model's error arises, and tell them from those that drag it along.

    Both models run on the same inputs. For each layer: its *local* error, when it is fed with the reference's
    values (the quantization of its inputs and weights belongs to it); its *accumulated* error, when the model
    runs by itself; and, for the worst, the *impact*: what its local error does to the outputs when nothing
    else is wrong (layers that read one rounded value count together). Rows go by impact; where two are within
    3 dB, by local error. SQNR in dB: more is better.

    \b
    Examples:
      splitfold drift model.onnx out --data held_out.npz
      splitfold drift model.onnx out --data held_out.npz --layer 'encoder.layer.3.*' --all
    """
    first = read_model(model_path(reference))
    read_model(model_path(compiled))
    batches, words = open_data(data, first)
    found = drift(
        reference, compiled, batches, only=layer or (), padding=None if padding == "none" else padding
    )
    if as_json:
        out().print(json.dumps(found.to_json(), indent=1), soft_wrap=True)
        return
    _print_outputs(found, f"{compiled} against {reference}", words)
    if everything:
        _print_all(found)
    else:
        _print_ranked(found)
        _print_dragged(found)
    if found.unmatched:
        _say(f"not compared: {'; '.join(found.unmatched[:5])}{_more(len(found.unmatched) - 5)}")


def _print_outputs(found: Drift, models: str, words: str) -> None:
    slices = f", run in {found.slices} slices" if found.slices > 1 else ""
    _say(f"{models} over {_count(found.batches, 'batch')} of {words}{slices}")
    if found.padding is not None:
        _say(f"left out: positions where '{found.padding}' is 0 (--padding none keeps them)")
    for name, deviation in found.outputs.items():
        equal = deviation.max_abs == 0
        _say(f"output '{name}': {'equal' if equal else f'{deviation}, relative {deviation.relative:.3g}'}")


def _print_ranked(found: Drift) -> None:
    sources = found.sources()
    if not sources:
        _say("no layer is a source of error above float rounding")
        return
    layers = list({point.layer: point for point in reversed(sources)}.values())
    layers.sort(key=sources.index)
    _print_rows([(str(rank), point.layer, point) for rank, point in enumerate(layers[:_TOP], start=1)], "#")
    if len(layers) > _TOP:
        rest = ", ".join(point.layer for point in layers[_TOP : _TOP + 3])
        _say(f"smaller sources: {rest}{_more(len(layers) - _TOP - 3)} (--all shows every value)")


def _print_dragged(found: Drift) -> None:
    own = {point.layer for point in found.points if point.source}
    dragged = {
        point.layer: point
        for point in found.points
        if point.layer not in own and point.accumulated.relative > 0 and point.layer
    }
    worst = sorted(dragged.values(), key=lambda point: point.accumulated.sqnr_db)
    if worst:
        names = ", ".join(f"{point.layer} ({_db(point.accumulated)} dB)" for point in worst[:3])
        _say(f"merely dragged along, no error of their own: {names}{_more(len(worst) - 3)}")


def _print_all(found: Drift) -> None:
    rows = [(str(point.depth), f"{point.layer}: {point.value}", point) for point in found.points]
    _print_rows(rows, "depth")


def _print_rows(rows: Sequence[tuple[str, str, Point]], first: str) -> None:
    """Print one line for each row, and one below it for what can be seen of the cause."""
    edge = max(len(first), *(len(position) for position, _, _ in rows))
    wide = min(max(len("layer"), *(len(name) for _, name, _ in rows)), _LAYER)
    operator = max(len("operator"), *(len(point.operator) for _, _, point in rows))
    numbers = "".join(f"{name:>11}" for name in _NUMBERS)
    heading = f"{first:>{edge}}  {'layer':<{wide}}  {'operator':<{operator}}{numbers}"
    _say(f"\n{heading}\n{'-' * len(heading)}")
    for position, name, point in rows:
        cells = "".join(f"{cell:>11}" for cell in _numbers(point))
        _say(f"{position:>{edge}}  {name:<{wide}}  {point.operator:<{operator}}{cells}")
        if point.note:
            indent = " " * (edge + 4)
            _say(textwrap.fill(point.note, _WIDTH, initial_indent=indent, subsequent_indent=indent))
    _say("")


def _numbers(point: Point) -> tuple[str, ...]:
    far = point.accumulated
    return _db(point.local), _db(far), f"{far.cosine:.4f}", _db(point.impact)


def _db(found: Deviation | None) -> str:
    if found is None:
        return "-"
    return "equal" if found.relative == 0 else f"{found.sqnr_db:.1f}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 'es' if what.endswith('ch') else 's'}"


def _more(number: int) -> str:
    return f", and {number} more" if number > 0 else ""


def _say(text: str) -> None:
    out().print(text, soft_wrap=True)
