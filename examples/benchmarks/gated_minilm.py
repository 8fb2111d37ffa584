# SPDX-License-Identifier: Apache-2.0
"""Does fine-tuning with gates rid MiniLM of its outliers? Sentence pairs of STS-Benchmark, train to dev.

    python -m splitfold.examples.benchmarks.gated_minilm [--steps 300] [--models folder]

Gates start as the identity. They are trained alone, or with all weights; the control trains all weights
without gates. The loss is the squared distance of each pair's cosine from its gold score over 5. Each model
is quantized with one static grid a tensor and no fold of scales, with ranges from the extremes and from the
least squared error, and with the preset int8. Trained models are kept in the folder, and a run that was
stopped goes on there.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from splitfold.compiler import Pipeline, Tolerance, Trained, compile, finetune, presets
from splitfold.compiler.debug.outliers.measurement import measure_outliers
from splitfold.examples.benchmarks import data
from splitfold.examples.benchmarks.attention_subjects import without_gates
from splitfold.examples.benchmarks.data import Feeds, Floats, Pairs
from splitfold.examples.benchmarks.minilm import Encoder, capture, embed, spearman
from splitfold.examples.benchmarks.report import Report, arguments, open_bare, say
from splitfold.runtime.training import Step

PAIRS, TESTED, CALIBRATED, OUTLIERS, BATCH = 16, 500, 64, 32, 16
QUICK = 24
HIGHEST = 5.0
GATES = "gate-attention{kind=all-heads}"
STATIC = "canonicalize,quantize-activations{{calibrator={calibrator}}}"
QUANTIZED = {
    "static int8 a tensor, extremes": STATIC.format(calibrator="minmax"),
    "static int8 a tensor, least squares": STATIC.format(calibrator="mse"),
    "preset int8": str(presets.int8()),
}


@dataclass(frozen=True)
class Run:
    """How a model is trained."""

    name: str
    passes: str
    train: Trained
    rate: float


RUNS = (
    Run("all weights, no gates", "", Trained.ALL, 2e-5),
    Run("gates alone", GATES, Trained.ADDED, 1e-3),
    Run("gates and all weights", GATES, Trained.ALL, 2e-5),
)


def pair_loss(outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    """Mean squared distance of the cosines of pairs from the gold scores over 5; a batch holds the first
    sentences before the second ones."""
    states, mask = next(iter(outputs.values())), batch["attention_mask"][..., None].float()
    pooled = (states * mask).sum(1) / mask.sum(1)
    first, second = pooled.chunk(2)
    return (functional.cosine_similarity(first, second) - batch["gold"]).square().mean()


def training_batches(encoder: Encoder, seed: int) -> list[Feeds]:
    """Batches of pairs of similar length, with gold scores over 5."""
    pairs = data.stsb("train")
    lengths = np.array(
        [len(first) + len(second) for first, second in zip(pairs.first, pairs.second, strict=True)]
    )
    order = np.lexsort((np.random.default_rng(seed).random(len(lengths)), lengths // 16))
    found = []
    for at in range(0, len(order) - PAIRS + 1, PAIRS):
        some = order[at : at + PAIRS]
        texts = [pairs.first[i] for i in some] + [pairs.second[i] for i in some]
        found.append(encoder.feeds(texts) | {"gold": (pairs.gold[some] / HIGHEST).astype(np.float32)})
    return found


@dataclass(frozen=True, eq=False)
class Bench:
    """What all models are measured on."""

    pairs: Pairs
    held_out: Sequence[Feeds]
    calibration: Sequence[Feeds]

    @staticmethod
    def of(encoder: Encoder, quick: bool) -> Bench:
        """Every so many pairs of dev, sentences of train."""
        whole, count = data.stsb("dev"), QUICK if quick else TESTED
        picks = np.linspace(0, len(whole.first) - 1, count).astype(int)
        pairs = Pairs([whole.first[i] for i in picks], [whole.second[i] for i in picks], whole.gold[picks])
        texts = data.stsb("train").sentences
        drawn = np.random.default_rng(0).permutation(len(texts))[:CALIBRATED]
        calibration = encoder.batches([texts[i] for i in drawn], BATCH)
        return Bench(pairs, encoder.batches(pairs.sentences, BATCH), calibration)

    def rows(self, name: str, file: Path, report: Report) -> None:
        """Outliers and the metric of a model, and of what its int8 forms keep of it."""
        found = measure_outliers(file, self.calibration[: OUTLIERS // BATCH])
        outliers = ", ".join(f"{what} {value:.1f}" for what, value in without_gates(found).items())
        own = embed(open_bare(file), self.held_out)
        report.note(f"{name}: fp32", f"Spearman {spearman(own, self.pairs):.4f}; {outliers}")
        for title, pipeline in QUANTIZED.items():
            report.note(f"{name}: {title}", self.quantized(file, pipeline, own))
        say(name)

    def quantized(self, file: Path, pipeline: str, own: Floats) -> str:
        """Cosine to the float model of its own, and Spearman."""
        artifact = compile(
            file,
            calibration=self.calibration,
            pipeline=Pipeline.parse(pipeline),
            tolerance=Tolerance(cosine=None),
            speed=None,
            reproducers=None,
        )
        with tempfile.TemporaryDirectory() as folder:
            session = open_bare(artifact.save_model(Path(folder) / "int8.onnx"))
            made = embed(session, self.held_out)
        cosine = (made * own).sum(1)
        rank = spearman(made, self.pairs)
        return f"cosine {cosine.mean():.5f} (least {cosine.min():.4f}), Spearman {rank:.4f}"


def trained(run: Run, model: Path, batches: Sequence[Feeds], steps: int, folder: Path) -> Path:
    """Train a model as `run` says, and return its file."""
    stem = f"{run.name.replace(' ', '-').replace(',', '')}-{steps}"
    file = folder / f"{stem}.onnx"
    if file.is_file():
        return file
    start = ir.load(model)
    Pipeline.parse(f"canonicalize,{run.passes}" if run.passes else "canonicalize").run(start)
    made = finetune(
        start,
        batches,
        pair_loss,
        steps,
        train=run.train,
        rate=run.rate,
        checkpoint=folder / f"{stem}.pt",
        checkpoint_every=25,
        observer=functools.partial(_told, run.name),
    )
    ir.save(made, file)
    return file


def _told(name: str, step: Step) -> None:
    if step.number % max(1, step.steps // 10) == 0:
        say(f"{name}: step {step.number} of {step.steps}, loss {step.loss:.4f}")


def main() -> int:
    """Print the table."""
    options = arguments(
        __doc__,
        ("--steps", {"type": int, "default": 300, "help": f"steps of {PAIRS} pairs"}),
        ("--seed", {"type": int, "default": 0}),
        ("--models", {"type": Path, "help": "folder that trained models are kept in"}),
        ("--quick", {"action": "store_true", "help": "two steps, few pairs"}),
    )
    torch.manual_seed(options.seed)
    encoder, steps = Encoder(), 2 if options.quick else options.steps
    report = Report(f"MiniLM, {steps} steps of {PAIRS} pairs of STS-Benchmark train; measured on dev")
    with tempfile.TemporaryDirectory() as name:
        folder = options.models or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        model, bench = folder / "minilm.onnx", Bench.of(encoder, options.quick)
        if not model.is_file():
            capture(encoder, model)
        batches = training_batches(encoder, options.seed)
        bench.rows("as it is", model, report)
        for run in RUNS:
            bench.rows(run.name, trained(run, model, batches, steps, folder), report)
    return int(report.finish() > 0)


if __name__ == "__main__":
    raise SystemExit(main())
