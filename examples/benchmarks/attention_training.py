# SPDX-License-Identifier: Apache-2.0
"""Does attention that can do nothing spare a model its outliers? Trained three ways and quantized.

    python -m splitfold.examples.benchmarks.attention_training [--subjects causal vit] [--seeds 0 1 2]
        [--variants vanilla clipped gated] [--steps 800] [--models folder]

Language models of characters (4 blocks of width 256, 128 positions; causal or masked) and a small ViT are
trained from scratch with vanilla, clipped and gated attention (`substitute`), then quantized to 8 bits (and 6
and 4 bits of activations): simulated grids of all that layers, norms, additions and both products of
attention read, one a tensor, and of weights, one an output channel, with ranges from the extremes and from
the least squared error. Infinity norm and kurtosis are shown over the steps. Trained models are kept in the
folder; a run that was stopped goes on there, and one model can be trained at a time.
"""

from __future__ import annotations

import argparse
import functools
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from splitfold.compiler import Artifact, Tolerance, compile
from splitfold.compiler.debug.outliers.measurement import measure_outliers
from splitfold.examples.benchmarks.attention_subjects import (
    SUBJECTS,
    VARIANTS,
    Subject,
    started,
    without_gates,
)
from splitfold.examples.benchmarks.report import Report, arguments, say
from splitfold.examples.training.char_lm import IGNORED
from splitfold.examples.training.resumable import Cell, train_cell
from splitfold.passes.pipeline import Pipeline

STEPS, LOOKS, QUICK = 800, 8, 2
LOST = 2.0
"""Percent of the metric that the paper's substitutions lose at most, in kind."""
RANGES = {"extremes": "calibrator=minmax", "least squares": "calibrator=mse,weight-ranges=searched"}
WIDTHS = ((8, 8), (8, 6), (8, 4))


def exported(subject: Subject, module: nn.Module) -> Artifact:
    """The module as ONNX, with clipped softmaxes in one operator."""
    shapes = ({0: torch.export.Dim("batch")},)
    pipeline = "canonicalize,fold-clips"
    return compile(
        module, subject.example, pipeline=pipeline, dynamic_shapes=shapes, speed=None, reproducers=None
    )


def metric(subject: Subject, artifact: Artifact) -> float:
    """Perplexity, or accuracy in percent, on what is held out."""
    session, found, count = artifact.session(), 0.0, 0
    for x, wanted in subject.held_out:
        logits = torch.from_numpy(session.run({session.inputs[0]: x.numpy()})[session.outputs[0]])
        if subject.perplexity:
            flat, targets = logits.flatten(0, 1), wanted.flatten()
            found += float(nn.functional.cross_entropy(flat, targets, ignore_index=IGNORED, reduction="sum"))
            count += int((targets != IGNORED).sum())
        else:
            found += float((logits.argmax(-1) == wanted).sum())
            count += len(wanted)
    return math.exp(found / count) if subject.perplexity else 100 * found / count


def look(subject: Subject, name: str, module: nn.Module, step: int) -> dict[str, float]:
    """The metric, infinity norm and kurtosis after so many steps."""
    artifact = exported(subject, module)
    found = measure_outliers(artifact.model, subject.calibration[:1], padding=None)
    seen = {"metric": metric(subject, artifact), **without_gates(found)}
    say(f"{name}, step {step}: {', '.join(f'{key} {value:.4g}' for key, value in seen.items())}")
    return seen


def trained(
    subject: Subject, variant: str, seed: int, steps: int, folder: Path
) -> tuple[Artifact, list[dict[str, float]]]:
    """Train one model, or take it from the folder; return it and what was seen on the way."""
    name = f"{subject.name.split()[0]}-{variant}-{seed}-{steps}"
    module = started(subject, variant, seed)
    cell = Cell(
        lambda step: subject.batch([seed, step]),
        subject.loss,
        steps,
        subject.rate,
        subject.decay,
        max(1, steps // LOOKS),
        functools.partial(look, subject, name),
    )
    looks = train_cell(module.train(), cell, folder / f"{name}.pt")
    artifact = exported(subject, module.eval())
    artifact.save_model(folder / f"{name}.onnx")
    return artifact, looks


def quantized(subject: Subject, artifact: Artifact, ranges: str, bits: tuple[int, int]) -> float:
    """The metric that simulated bits of weights and activations leave."""
    options = f"weights={bits[0]},activations={bits[1]},products=true,residuals=true,{ranges}"
    made = compile(
        artifact.model,
        calibration=subject.calibration,
        pipeline=Pipeline.parse(f"canonicalize,simulate-quantization{{{options}}}"),
        tolerance=Tolerance(cosine=None),
        speed=None,
        reproducers=None,
    )
    return metric(subject, made)


def rows(subject: Subject, variant: str, options: argparse.Namespace, folder: Path, report: Report) -> None:
    """All rows of one variant, over the seeds."""
    steps = QUICK if options.quick else options.steps
    found = [trained(subject, variant, seed, steps, folder) for seed in options.seeds]
    label = f"{subject.name}, {variant}"
    full = [metric(subject, artifact) for artifact, _ in found]
    report.note(f"{label}: fp32 {subject.metric}", spread(full))
    for bits in WIDTHS:
        for title, ranges in RANGES.items():
            left = [quantized(subject, artifact, ranges, bits) for artifact, _ in found]
            lost = [100 * abs(a - b) / b for a, b in zip(left, full, strict=True)]
            what = f"{label}: W{bits[0]}A{bits[1]}, {title}"
            text = f"{spread(left)}, {np.mean(lost):.2f} % lost"
            if variant == "vanilla" or bits != WIDTHS[0] or options.quick:
                report.note(what, text)
            else:
                report.verdict(what, text, f"< {LOST:g} % lost", bool(np.mean(lost) < LOST))
    for at in range(len(found[0][1])):
        seen = [looks[at] for _, looks in found]
        report.note(f"{label}: step {seen[0]['step']:.0f}", ", ".join(_over(seen)))


def _over(seen: Sequence[dict[str, float]]) -> list[str]:
    names = [name for name in seen[0] if name not in ("step", "loss")]
    return [f"{name} {spread([it[name] for it in seen])}" for name in names]


def spread(values: Sequence[float]) -> str:
    """Mean and, of several, lowest to highest."""
    text = f"{np.mean(values):.4g}"
    return text if len(values) == 1 else f"{text} ({min(values):.4g} to {max(values):.4g})"


def main() -> int:
    """Print the table."""
    options = arguments(
        __doc__,
        ("--subjects", {"nargs": "+", "choices": list(SUBJECTS), "default": ["causal", "vit"]}),
        ("--variants", {"nargs": "+", "choices": list(VARIANTS), "default": list(VARIANTS)}),
        ("--seeds", {"nargs": "+", "type": int, "default": [0, 1, 2]}),
        ("--steps", {"type": int, "default": STEPS}),
        ("--models", {"type": Path, "help": "folder that trained models are kept in"}),
        ("--quick", {"action": "store_true", "help": "two steps, little data"}),
    )
    steps = QUICK if options.quick else options.steps
    report = Report(f"Trained {steps} steps, seeds {options.seeds}: mean (lowest to highest)")
    with tempfile.TemporaryDirectory() as name:
        folder = options.models or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        for key in options.subjects:
            subject = SUBJECTS[key](options.quick)
            for variant in options.variants:
                rows(subject, variant, options, folder, report)
    return int(report.finish() > 0)


if __name__ == "__main__":
    raise SystemExit(main())
