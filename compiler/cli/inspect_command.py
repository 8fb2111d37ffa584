# SPDX-License-Identifier: Apache-2.0
"""``splitfold inspect``."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import onnx_ir as ir
import typer

from splitfold.compiler.cli.options import DebugOption
from splitfold.compiler.cli.output import file_bytes, megabytes, out, say, table
from splitfold.compiler.cli.report import print_deviation, print_kernels
from splitfold.compiler.cli.session_options import say_offline, say_session
from splitfold.compiler.inspection import (
    LayerFacts,
    attention_report,
    constant_bytes,
    inspect_layers,
    operator_counts,
)
from splitfold.passes.attention_block import AttentionReport
from splitfold.runtime.artifact import read_manifest
from splitfold.runtime.errors import ArtifactError
from splitfold.runtime.feeds import model_inputs
from splitfold.runtime.model_file import model_path, read_model
from splitfold.runtime.options import SessionOptions

__all__ = ["inspect_command"]


def inspect_command(
    path: Annotated[Path, typer.Argument(help="An .onnx file or an artifact folder.")],
    debug: DebugOption = False,
) -> None:
    """Show what a model holds: inputs, outputs, operators, and each layer's precision and bytes.

    Of a model that splitfold made it also shows the pipeline, the kernels and the deviation on record.

    \b
    Example:
      splitfold inspect out
    """
    file = model_path(path)
    model = read_model(file)
    say("file", f"{file}, {megabytes(file_bytes(file))}, constants {megabytes(constant_bytes(model))}")
    opsets = ", ".join(
        f"{domain or 'ai.onnx'} {version}" for domain, version in sorted(model.opset_imports.items())
    )
    say("opset", f"{opsets}; IR version {model.ir_version}")
    _print_signature(model)
    counts = operator_counts(model)
    say(
        "operators",
        f"{sum(counts.values())}: " + ", ".join(f"{name} {count}" for name, count in counts.items()),
    )
    _print_attention(attention_report(model))
    manifest = _manifest(path)
    _print_layers(inspect_layers(model), manifest.get("realised", {}), constant_bytes(model))
    if manifest:
        _print_manifest(manifest)


def _print_signature(model: ir.Model) -> None:
    for word, values in (("input", model_inputs(model)), ("output", model.graph.outputs)):
        for value in values:
            dtype = value.dtype.name.lower() if value.dtype is not None else "?"
            say(word, f"{value.name}: {dtype} {_shape(value)}")


def _shape(value: ir.Value) -> str:
    return (
        "shape unknown"
        if value.shape is None
        else f"[{', '.join(str(d) if isinstance(d, int) else str(d.value or '?') for d in value.shape)}]"
    )


def _print_attention(report: AttentionReport) -> None:
    """Print how many blocks of each kind there are, and each softmax that is none with its reason."""
    if report.blocks:
        counts = Counter(str(block) for block in report.blocks)
        found = "; ".join(f"{count} x {kind}" for kind, count in counts.items())
        say("attention", f"{len(report.blocks)} blocks: {found}")
    for name, count in Counter(f"{miss.name}: no attention: {miss.reason}" for miss in report.misses).items():
        say("softmax", name if count == 1 else f"{name} ({count} times)")


def _print_layers(layers: Sequence[LayerFacts], realised: Mapping[str, Any], total: int) -> None:
    rows = [
        (
            facts.layer,
            facts.kind,
            " x ".join(str(size) for size in facts.shape),
            facts.precision,
            f"{facts.size:,}",
            realised.get(facts.layer, {}).get("kernel", "-"),
        )
        for facts in layers
    ]
    held = sum(facts.size for facts in layers)
    rows.append(("other constants", "", "", "", f"{total - held:,}", ""))
    rows.append(("total", "", "", _shares(layers), f"{total:,}", ""))
    table(("layer", "operator", "weight", "precision", "bytes#", "kernel on record"), rows)


def _shares(layers: Iterable[LayerFacts]) -> str:
    counts: dict[str, int] = {}
    for facts in layers:
        counts[facts.precision] = counts.get(facts.precision, 0) + 1
    return "; ".join(f"{count} x {precision}" for precision, count in counts.items())


def _manifest(path: Path) -> dict[str, Any]:
    with contextlib.suppress(ArtifactError):
        return read_manifest(path)
    return {}


def _print_manifest(manifest: Mapping[str, Any]) -> None:
    say("pipeline", manifest.get("pipeline"))
    say(
        "made with",
        ", ".join(f"{name} {version}" for name, version in dict(manifest.get("versions", {})).items()),
    )
    say_session(SessionOptions.of(manifest.get("session", {})))
    say_offline(manifest)
    for name in ("source", "calibration"):
        say(name, f"digest {manifest.get(name) or '-'}")
    print_kernels(manifest)
    if "deviation" in manifest:
        print_deviation(manifest)
    out().print(
        "splitfold replay makes it again from its source and calibration data, and compares the bytes."
    )
