# SPDX-License-Identifier: Apache-2.0
"""A small vision transformer in few simulated bits and in real int8: plain grids beside RepQ's fold.

    python -m splitfold.examples.benchmarks.vit [--model small_vit.onnx] [--seeds 3] [--images 10000]

The model is that of `examples/training/small_vit.py` on Fashion-MNIST, which is trained first (6 minutes)
where no file is given. It is measured twice: as trained, and written so that the channels of its norms'
outputs differ widely in range, which is what RepQ is made for. The second computes the same function: gains
and biases of the norms are multiplied by log-normal factors, and the weights behind them divided. A seed
draws the calibration images. Each row is the mean over seeds with the spread (highest minus lowest).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from splitfold.compiler import Tolerance, compile
from splitfold.examples.benchmarks.data import Feeds, Floats, Labels
from splitfold.examples.benchmarks.report import Report, arguments, open_bare, say
from splitfold.examples.training.small_vit import fashion
from splitfold.passes.activations import channel_extremes
from splitfold.passes.fold import fold
from splitfold.passes.foldable import scale_groups
from splitfold.passes.pipeline import Pipeline
from splitfold.passes.repq import repq_obstacle
from splitfold.passes.values import forget_names
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.target import Target

CALIBRATION = 32
MORE = 256
BATCH = 500
WIDTHS = (6, 4)
AIMED = 6
"""The width with a target."""
SIGMA = 1.0
"""Standard deviation of the logarithm of a channel's factor."""
BEHIND_NORMS = "[*.qkv,*.fc1]"
RECOVERED = 0.8
LOSS = 0.5
"""Points below which a loss is not told from noise on 10,000 images."""


PLAIN, REPQ = "plain", "repq"
STATIC = {PLAIN: "quantize-activations", REPQ: "fold-scales{method=repq},quantize-activations"}


def simulate(*options: str) -> str:
    """Text of the simulating pass."""
    return f"simulate-quantization{{{','.join(options)}}}"


def whole(bits: int) -> dict[str, str]:
    """Pipelines that quantize weights and inputs of all layers."""
    both, fold = f"weights={bits},activations={bits}", f"fold-scales{{method=repq,bits={bits}}}"
    searched = simulate(both, "calibrator=percentile-search")
    return {
        PLAIN: simulate(both),
        REPQ: f"{fold},{simulate(both)}",
        "plain, percentile search": searched,
        "repq, percentile search of the other inputs": (
            f"{fold},{simulate(both, f'only={BEHIND_NORMS}')},{searched}"
        ),
        "plain, attention's products too": simulate(both, "products=true"),
        "repq, attention's products too": f"{fold},{simulate(both, 'products=true')}",
    }


def parts(bits: int) -> dict[str, str]:
    """Pipelines that quantize one kind of tensor."""
    inputs, fold = f"weights=none,activations={bits}", f"fold-scales{{method=repq,bits={bits}}}"
    norms, weights = simulate(inputs, f"only={BEHIND_NORMS}"), simulate(f"weights={bits},activations=none")
    return {
        "norm outputs alone, plain": norms,
        "norm outputs alone, repq": f"{fold},{norms}",
        "other inputs alone": simulate(inputs, f"exclude={BEHIND_NORMS}"),
        "weights alone, plain": weights,
        "weights alone, repq": f"{fold},{weights}",
    }


@dataclass(frozen=True)
class Bench:
    """Compiles a model and measures its accuracy in percent."""

    folder: Path
    seeds: int
    train: Floats
    images: Floats
    labels: Labels

    def accuracy(self, model: Path) -> float:
        """Accuracy in plain onnxruntime, in percent."""
        session = open_bare(model)
        name = session.get_inputs()[0].name
        starts = range(0, len(self.images), BATCH)
        found = [session.run(None, {name: self.images[at : at + BATCH]})[0].argmax(-1) for at in starts]
        return 100 * float((np.concatenate(found) == self.labels).mean())

    def calibration(self, model: Path, seed: int, count: int) -> Sequence[Feeds]:
        """Images of the training set drawn by `seed`."""
        picks = np.random.default_rng(seed).permutation(len(self.train))[:count]
        return [
            {ir.load(model).graph.inputs[0].name or "": self.train[picks[at : at + CALIBRATION]]}
            for at in range(0, count, CALIBRATION)
        ]

    def row(self, model: Path, pipeline: str, count: int = CALIBRATION) -> list[float]:
        """The accuracy that `pipeline` leaves, one number a seed."""
        found = []
        for seed in range(self.seeds):
            artifact = compile(
                model,
                calibration=self.calibration(model, seed, count),
                pipeline=Pipeline.parse(f"canonicalize,{pipeline}"),
                tolerance=Tolerance(cosine=None),
                reproducers=None,
            )
            found.append(self.accuracy(artifact.save_model(self.folder / "quantized.onnx")))
        say(f"{model.stem} {pipeline}: {words(found)}")
        return found


def words(found: Sequence[float]) -> str:
    """Mean and spread."""
    return f"{np.mean(found):.2f} ({np.ptp(found):.2f})"


def spread(model: Path, file: Path) -> Path:
    """Write `model` with the channels of its norms' outputs multiplied by seeded log-normal factors, and the
    weights behind them divided: the same function."""
    found = ir.load(model)
    forget_names(found)
    rng = np.random.default_rng(0)
    for group in scale_groups(found):
        if group.region is not None and repq_obstacle(group) is None:
            fold(found, group.region, np.exp(rng.normal(0, SIGMA, group.region.scales)).astype(np.float32))
    ir.save(found, file)
    return file


def ranges(model: Path, calibration: Sequence[Feeds]) -> str:
    """How much wider the widest channel of a norm's output is than its median channel."""
    found = ir.load(model)
    norms = [node.outputs[0].name or "" for node in found.graph if node.op_type == "LayerNormalization"]
    seen = channel_extremes(found, norms, Calibration.of(calibration), Target.cpu())
    ratios = []
    for low, high in seen.values():
        widths = np.maximum(high, 0) - np.minimum(low, 0)
        ratios.append(float(widths.max() / np.median(widths)))
    return f"{np.median(ratios):.1f} times in the median norm, {max(ratios):.1f} at most"


def subject_rows(bench: Bench, model: Path, title: str, parts_at: int, report: Report) -> None:
    """The rows of one model; its parts are told apart at `parts_at` bits."""
    full = bench.accuracy(model)
    report.note(f"{title}: fp32", f"{full:.2f}")
    data = bench.calibration(model, 0, CALIBRATION)
    report.note(f"{title}: widest channel of a norm over its median channel", ranges(model, data))
    for bits in WIDTHS:
        found = {name: bench.row(model, text) for name, text in whole(bits).items()}
        for name, values in found.items():
            report.note(f"{title}: W{bits}A{bits} {name}", words(values))
        recovered(f"{title}: W{bits}A{bits}", full, found[PLAIN], found[REPQ], bits == AIMED, report)
    for name, text in parts(parts_at).items():
        report.note(f"{title}: {parts_at} bits, {name}", words(bench.row(model, text)))
    for name in (PLAIN, REPQ):
        values = bench.row(model, whole(parts_at)[name], MORE)
        report.note(f"{title}: W{parts_at}A{parts_at} {name}, {MORE} images", words(values))
    for name, text in STATIC.items():
        report.note(f"{title}: W8A8 static int8, {name}", words(bench.row(model, text)))


def recovered(
    title: str, full: float, plain: Sequence[float], folded: Sequence[float], aim: bool, report: Report
) -> None:
    """The share of the plain loss that the fold recovers, with a target where `aim` is set."""
    loss = full - float(np.mean(plain))
    label = f"{title}: share of the plain loss of {loss:.2f} points that RepQ recovers"
    if loss < LOSS:
        report.note(label, f"none to speak of: below {LOSS} points it is noise")
        return
    share = (float(np.mean(folded)) - float(np.mean(plain))) / loss
    if aim:
        report.check(label, share, RECOVERED, form=".2f")
    else:
        report.note(label, f"{share:.2f}")


def trained(folder: Path) -> Path:
    """Train the model and return its file."""
    file = folder / "small_vit.onnx"
    command = [sys.executable, "-m", "splitfold.examples.training.small_vit", "-o", str(file)]
    subprocess.run(command, check=True)
    return file


def main() -> int:
    """Print the table."""
    options = arguments(
        __doc__,
        ("--model", {"type": Path, "help": "the trained model; without it one is trained"}),
        ("--seeds", {"type": int, "default": 3, "help": "draws of the calibration images"}),
        ("--images", {"type": int, "default": 10_000, "help": "test images, evenly over the classes"}),
    )
    images, labels = fashion("test")
    some = np.linspace(0, len(images) - 1, min(options.images, len(images))).astype(int)
    report = Report(
        f"Small ViT, accuracy in % on {len(some)} images, {options.seeds} draws of {CALIBRATION} calibration "
        "images; mean (spread)"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model or trained(folder)
        bench = Bench(folder, options.seeds, fashion("train")[0], images[some], labels[some])
        subject_rows(bench, model, "as trained", 4, report)
        subject_rows(bench, spread(model, folder / "spread.onnx"), "norms spread", 6, report)
    return int(report.finish() > 0)


if __name__ == "__main__":
    raise SystemExit(main())
