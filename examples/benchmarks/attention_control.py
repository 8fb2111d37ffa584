# SPDX-License-Identifier: Apache-2.0
"""The negative control of clipped and gated attention: put into trained models without training.

    python -m splitfold.examples.benchmarks.attention_control [--subjects vit minilm] [--vit small_vit.onnx]

Both are other functions, to be trained with. Here nothing is trained, so the metric shows what the
substitution alone costs: by gamma = -alpha / T, with T the number of keys (of MiniLM the mean number of
tokens of a sentence), and by how far a gate starts open. The small ViT is trained first where no file is
given.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir

from splitfold.compiler.debug.outliers.measurement import measure_outliers
from splitfold.examples.benchmarks.data import Feeds
from splitfold.examples.benchmarks.precision_subjects import SUBJECTS
from splitfold.examples.benchmarks.report import Report, arguments, open_bare, say
from splitfold.examples.benchmarks.weight_subjects import Subject
from splitfold.passes.base import Pass
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.clip_softmax import ClipSoftmaxPass
from splitfold.passes.gate_attention import GateAttentionPass, GateKind
from splitfold.passes.pipeline import Pipeline

ALPHAS = (0.03, 0.1, 0.3, 1.0, 2.0, 4.0)
QUICK = (0.1, 1.0)
OPEN = (0.9, 0.5)


def keys(batch: Feeds, model: ir.Model) -> float:
    """The number of keys of a query: the tokens that are no padding, or the length that the graph fixes."""
    if "attention_mask" in batch:
        return float(batch["attention_mask"].sum(-1).mean())
    lengths = {value.shape[-1] for value in _probabilities(model) if value.shape is not None}
    return float(next(length for length in lengths if isinstance(length, int)))


def _probabilities(model: ir.Model) -> list[ir.Value]:
    return [node.outputs[0] for node in model.graph if node.op_type == "Softmax"]


def substituted(model: ir.Model, step: Pass, file: Path) -> Path:
    """Write `model` after a pass."""
    made = model.clone()
    Pipeline.of(CanonicalizePass(), step).run(made)
    ir.save(made, file)
    return file


def shown(found: dict[str, float]) -> str:
    """What was measured, as text."""
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items())


def clip_rows(subject: Subject, alphas: tuple[float, ...], folder: Path, report: Report) -> None:
    """The metric by gamma, and how many probabilities it makes exact zeros."""
    model, batch = ir.load(subject.model), subject.calibration(0)[0]
    length = keys(batch, model)
    label = f"{subject.name}: softmax clipped, alpha"
    for alpha in (0.0, *alphas):
        step = ClipSoftmaxPass(gamma=-alpha / length)
        file = substituted(model, step, folder / "clipped.onnx")
        found = subject.measure(open_bare(file))
        say(f"{label} {alpha:g}: {shown(found)}")
        zeros = np.mean([block.zeros for block in measure_outliers(file, [batch]).attention])
        where = f"gamma {-alpha / length:.5f}, T {length:.1f}; {100 * zeros:.1f} % zeros"
        report.note(f"{label} {alpha:g}", f"{shown(found)}; {where}")


def gate_rows(subject: Subject, folder: Path, report: Report) -> None:
    """The metric by how far gates start open: divided by it, which changes nothing, and not."""
    model = ir.load(subject.model)
    for start in OPEN:
        for keep in (True, False):
            step = GateAttentionPass(kind=GateKind.LINEAR, init=start, keep=keep)
            found = subject.measure(open_bare(substituted(model, step, folder / "gated.onnx")))
            how = "over its start" if keep else "as it is"
            report.note(f"{subject.name}: gate {start:g} open, {how}", shown(found))
            say(f"{subject.name}, gate {start:g}, keep {keep}: {shown(found)}")


def main() -> int:
    """Print the table."""
    options = arguments(
        __doc__,
        ("--subjects", {"nargs": "+", "choices": ("vit", "minilm"), "default": ["vit", "minilm"]}),
        ("--vit", {"type": Path, "help": "the trained small ViT; without it one is trained"}),
        ("--quick", {"action": "store_true", "help": "few values on an eighth of the data"}),
    )
    report = Report("Attention substituted without training: the metric by gamma and by the gate")
    with tempfile.TemporaryDirectory() as name:
        for key in options.subjects:
            subject = SUBJECTS[key](Path(name), options.vit, options.quick)
            report.note(f"{subject.name}: as it is", shown(subject.measure(open_bare(subject.model))))
            clip_rows(subject, QUICK if options.quick else ALPHAS, Path(name), report)
            gate_rows(subject, Path(name), report)
    return int(report.finish() > 0)


if __name__ == "__main__":
    raise SystemExit(main())
