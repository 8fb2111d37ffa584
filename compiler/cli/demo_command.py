# SPDX-License-Identifier: Apache-2.0
"""``splitfold demo``."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from splitfold.compiler.cli.options import DebugOption
from splitfold.compiler.cli.output import errors, file_bytes, megabytes, out, table
from splitfold.compiler.driver import compile
from splitfold.compiler.inspection import LayerFacts, inspect_layers
from splitfold.compiler.presets import preset
from splitfold.compiler.progress import Progress
from splitfold.runtime.bench import Timing, bench
from splitfold.runtime.feeds import Array
from splitfold.runtime.model_file import MODEL_FILE, read_model
from splitfold.runtime.session import Session

__all__ = ["demo_command"]

_PRESETS = ("exact", "int8", "int4")


@dataclass(frozen=True)
class _Digits:
    model: Path
    calibration: Path
    images: Array
    labels: Array

    @staticmethod
    def load() -> _Digits:
        folder = Path(str(importlib.resources.files("splitfold.examples.digits")))
        with np.load(folder / "held_out.npz") as held_out:
            images = (held_out["x"][:, None] / 16).astype(np.float32)
            return _Digits(folder / "digits_vit.onnx", folder / "calibration.npz", images, held_out["y"])

    def accuracy(self, model: Path) -> float:
        logits = next(iter(Session(model).run({"image": self.images}).values()))
        return float((logits.argmax(-1) == self.labels).mean())


def demo_command(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the artifacts; replaced.")
    ] = Path("splitfold-demo"),
    runs: Annotated[int, typer.Option("--runs", min=1, help="Timed runs of each model.")] = 100,
    debug: DebugOption = False,
) -> None:
    """Compile a small vision transformer for handwritten digits, offline, and show what each preset gives.

    \b
    Example:
      splitfold demo -o splitfold-demo
    """
    digits = _Digits.load()
    files = {"original": digits.model}
    for name in _PRESETS:
        with Progress(errors()) as progress:
            artifact = compile(
                digits.model,
                pipeline=preset(name),
                calibration=progress.watch(digits.calibration),
                observers=[progress],
            )
        files[name] = artifact.save(output / name, overwrite=True) / MODEL_FILE
        out().print(f"{name:<6}{artifact.manifest['pipeline']}", soft_wrap=True)
        if artifact.speed is not None:
            out().print(f"      speed: {artifact.speed.statement}", soft_wrap=True)
    timings = bench(list(files.values()), {"image": digits.images[:64]}, threads=1, runs=runs)
    _print(digits, files, timings)
    out().print(f"The artifacts are in {', '.join(str(output / name) for name in _PRESETS)}.", soft_wrap=True)
    out().print(
        f"Next: splitfold inspect {output / 'int8'}; splitfold compile your-model.onnx -o out --preset int4",
        soft_wrap=True,
    )


def _print(digits: _Digits, files: dict[str, Path], timings: list[Timing]) -> None:
    rows = [
        (
            name,
            f"{100 * digits.accuracy(file):.2f} %",
            megabytes(file_bytes(file)),
            f"{timing.median_ms:.3f}",
            f"{timing.ratio:.2f}x",
            _low_bit(inspect_layers(read_model(file))),
        )
        for (name, file), timing in zip(files.items(), timings, strict=True)
    ]
    title = f"{len(digits.labels)} held-out digits; latency of 64 images on one thread, models taking turns"
    table(
        ("model", "accuracy#", "file#", "median ms#", "speed#", "weights in low-bit layers#"),
        rows,
        title=title,
    )


def _low_bit(layers: list[LayerFacts]) -> str:
    """Return the share of layer weights (elements) that stand in low-bit layers."""
    sizes = [
        (int(np.prod(facts.shape)), not facts.precision.startswith(("float", "bfloat", "double")))
        for facts in layers
    ]
    total = sum(size for size, _ in sizes)
    return f"{100 * sum(size for size, low in sizes if low) / total:.1f} %" if total else "-"
