# SPDX-License-Identifier: Apache-2.0
"""Small seeded models of many Hugging Face architectures in int8, beside onnxruntime's quantizers.

Run `python examples/benchmarks/architectures.py [--only NAME ...] [--family NAME ...] [--ours]
[--pipeline TEXT]`;
it needs the extra `splitfold[minilm]` and the tests folder, where the architectures are.
"""

from __future__ import annotations

import gc
import importlib
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from rich.table import Table

from splitfold.compiler import Artifact, compile, presets
from splitfold.compiler.capture import capture_torch
from splitfold.examples.benchmarks.data import Feeds, project
from splitfold.examples.benchmarks.ort_quantizers import ort_dynamic, ort_static
from splitfold.examples.benchmarks.report import (
    Report,
    arguments,
    console,
    held,
    left_in_float,
    low_bit,
    open_bare,
    run_all,
    say,
)
from splitfold.passes.layers import find_layers
from splitfold.passes.pipeline import Pipeline

CALIBRATION_SEEDS = range(1, 9)
TEST_SEEDS = range(101, 105)
LEAST = 0.99
SHARE = 90.0
RUNNABLE = 25
UNEXPLAINED = "in float without a reason"


@dataclass
class Result:
    """Of one architecture: cosines to fp32 by quantizer (None where it failed), and notes."""

    name: str
    family: str
    cosine: dict[str, float | None] = field(default_factory=dict)
    layers: str = ""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def zoo() -> tuple[Any, ...]:
    """The architectures of the tests."""
    folder = project() / "tests"
    if not (folder / "zoo.py").is_file():
        console.print("The architectures are in tests/zoo.py, which is not there: run this from a checkout.")
        raise SystemExit(2)
    sys.path.insert(0, str(folder))
    found: tuple[Any, ...] = importlib.import_module("zoo").ARCHITECTURES
    return found


def draws(architecture: Any, names: list[str], seeds: range) -> list[Feeds]:
    """Seeded inputs for the graph's own inputs."""
    drawn = [architecture.draw(seed) for seed in seeds]
    return [{name: value.numpy() for name, value in inputs.items() if name in names} for inputs in drawn]


def cosine(path: Path, feeds: list[Feeds], reference: list[Any]) -> float:
    """Cosine of the main output to fp32 over all test inputs."""
    actual = run_all(open_bare(path), feeds)
    x = np.concatenate([np.ravel(array).astype(np.float64) for array in reference])
    y = np.concatenate([np.ravel(array).astype(np.float64) for array in actual])
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def attempt(
    result: Result, name: str, feeds: list[Feeds], reference: list[Any], call: Callable[[], Path]
) -> None:
    """Quantize, open and run; note the reason where that fails."""
    try:
        result.cosine[name] = cosine(call(), feeds, reference)
    except Exception as error:
        result.cosine[name] = None
        text = str(error).strip() or traceback.format_exc(limit=-1).splitlines()[-2].strip()
        result.notes.append(f"{name} fails: {type(error).__name__}: {text.splitlines()[0][:220]}")


def unexplained(captured: ir.Model, artifact: Artifact) -> list[str]:
    """Layers of the captured model that are not in low precision, and for which no pass gave a reason."""
    canonical = captured.clone()
    presets.exact().run(canonical)
    layers, refused = find_layers(canonical)
    names = [layer.name for layer in layers] + [name for name, _ in refused]
    known = held(artifact) | {name for name, reason in left_in_float(artifact).items() if reason.strip()}
    return [name for name in names if name not in known]


def examine(architecture: Any, folder: Path, pipeline: Pipeline, ours_only: bool) -> Result:
    """Capture one architecture and quantize it every way."""
    result = Result(architecture.name, architecture.family)
    module, kwargs = architecture.build()
    model = folder / "captured.onnx"
    try:
        captured = capture_torch(module, kwargs, architecture.dynamic_shapes).model
    except Exception as error:
        result.cosine["splitfold int8"] = None
        result.notes.append(f"capture fails: {str(error)[:220]}")
        return result
    ir.save(captured, model)
    names = [str(value.name) for value in captured.graph.inputs]
    calibration, test = draws(architecture, names, CALIBRATION_SEEDS), draws(architecture, names, TEST_SEEDS)
    reference = run_all(open_bare(model), test)
    made: list[Artifact] = []

    def ours() -> Path:
        start = time.perf_counter()
        made.append(compile(model, calibration=calibration, pipeline=pipeline, speed=None))
        result.seconds = time.perf_counter() - start
        return made[0].save_model(folder / "ours.onnx")

    attempt(result, "splitfold int8", test, reference, ours)
    if made:
        result.layers = low_bit(made[0])
        groups: dict[str, int] = {}
        for reason in left_in_float(made[0]).values():
            groups[reason] = groups.get(reason, 0) + 1
        result.notes += [f"{count} in float: {reason}" for reason, count in groups.items()]
        result.notes += [f"{UNEXPLAINED}: {layer}" for layer in unexplained(captured, made[0])]
    if not ours_only:
        attempt(
            result,
            "onnxruntime static",
            test,
            reference,
            lambda: ort_static(model, folder / "static.onnx", calibration),
        )
        attempt(
            result,
            "onnxruntime dynamic",
            test,
            reference,
            lambda: ort_dynamic(model, folder / "dynamic.onnx"),
        )
    return result


def show(results: list[Result], quantizers: list[str]) -> None:
    """One line an architecture."""
    table = Table(title="Cosine of the main output to fp32", title_justify="left")
    for heading in ("architecture", "family", *quantizers, "layers low-bit", "s"):
        table.add_column(heading)
    for result in results:
        cells = []
        for name in quantizers:
            value = result.cosine.get(name)
            cells.append(
                "[red]fails[/]"
                if value is None
                else f"[{'green' if value >= LEAST else 'red'}]{value:.5f}[/]"
            )
        table.add_row(result.name, result.family, *cells, result.layers, f"{result.seconds:.1f}")
    console.print(table)


def main() -> int:
    """Print both tables."""
    options = arguments(
        __doc__,
        ("--only", {"nargs": "+", "default": [], "help": "names of architectures"}),
        ("--family", {"nargs": "+", "default": [], "help": "families of architectures"}),
        ("--pipeline", {"type": Pipeline.parse, "default": presets.int8(), "help": "in int8's place"}),
        ("--ours", {"action": "store_true", "help": "leave onnxruntime's quantizers out"}),
    )
    quantizers = ["splitfold int8"] + ([] if options.ours else ["onnxruntime static", "onnxruntime dynamic"])
    chosen = [
        item
        for item in zoo()
        if (not options.only or item.name in options.only)
        and (not options.family or item.family in options.family)
    ]
    results = []
    for item in chosen:
        with tempfile.TemporaryDirectory() as folder:
            result = examine(item, Path(folder), options.pipeline, options.ours)
        gc.collect()
        results.append(result)
        text = ", ".join(
            f"{name} {'fails' if value is None else f'{value:.5f}'}" for name, value in result.cosine.items()
        )
        say(
            f"{result.name} ({result.family}): {text}; {result.layers} layers low-bit, {result.seconds:.1f} s"
        )
        for note in result.notes:
            say(f"    {note}")
    show(results, quantizers)
    report = Report(f"{len(results)} architectures, calibrated on {len(CALIBRATION_SEEDS)} seeded batches")
    for name in quantizers:
        found = [result.cosine.get(name) for result in results]
        ran = sum(value is not None for value in found)
        good = sum(value is not None and value >= LEAST for value in found)
        share = 100 * good / max(len(found), 1)
        if name == "splitfold int8":
            report.verdict(
                f"{name}: compiles and runs",
                f"{ran} of {len(found)}",
                f"all, of at least {RUNNABLE}",
                ran == len(found) >= RUNNABLE,
            )
            report.check(
                f"{name}: cosine >= {LEAST} on, % ({good} of {len(found)})", share, SHARE, form=".1f"
            )
            silent = sum(note.startswith(UNEXPLAINED) for result in results for note in result.notes)
            report.check(f"{name}: layers left in float without a reason", silent, 0, most=True, form="d")
        else:
            report.note(f"{name}: runs on, cosine >= {LEAST} on", f"{ran} and {good} of {len(found)}")
    return int(report.finish() > 0)


if __name__ == "__main__":
    raise SystemExit(main())
