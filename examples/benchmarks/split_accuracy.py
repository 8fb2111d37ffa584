# SPDX-License-Identifier: Apache-2.0
"""The experiment of SplitQuant rebuilt: split weights, plain ones of as many bits, plain ones of their size.

Accuracies are simulated: rounded weights in a float file, activations in float.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from splitfold.examples.benchmarks.report import open_bare, say
from splitfold.examples.benchmarks.split_forms import Form, forms, part_index, write_rounded
from splitfold.examples.benchmarks.split_tables import Table, spread
from splitfold.examples.benchmarks.weight_subjects import Subject
from splitfold.examples.training.small_bert import trained
from splitfold.examples.training.texts import TASKS, Task, Vocabulary
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.part_codes import Grain

__all__ = ["classifier_tables", "subject_table"]

BATCH = 250
NOTHING = 0.2
"""Points of accuracy below which a mean over trainings tells nothing."""
Measure = Callable[[Any], float]
Found = dict[Form | None, tuple[float, list[float]]]
"""By form (None: fp32) its bits a weight and what was measured, one number a model."""


def measured(
    models: Sequence[Path], measure: Measure, widths: Sequence[int], folder: Path, *, tables: bool = False
) -> Found:
    """Measure every form of some widths on every model."""
    found: Found = {}
    for path in models:
        model = ir.load(path)
        CanonicalizePass()(model)
        found.setdefault(None, (32.0, []))[1].append(measure(open_bare(path)))
        index, file = part_index(), folder / "rounded.onnx"
        for form in (form for bits in widths for form in forms(bits)):
            bits = write_rounded(model, form, index, file, tables=tables)
            found.setdefault(form, (bits, []))[1].append(measure(open_bare(file)))
        say(f"{path.stem}: {len(found)} forms")
    return found


def rows(table: Table, found: Found, form: str) -> None:
    """Add one row a form."""
    for held, (bits, values) in found.items():
        table.add("fp32" if held is None else str(held), f"{bits:.2f}", spread(values, form))


def classifier_tables(folder: Path, kept: Path, seeds: int, tasks: Sequence[str]) -> list[Table]:
    """The tables of the classifiers, trained where `kept` does not hold them: seeds are those of training.

    The paper rounds linear layers only. Here most weights, and what was learnt, are in the word table,
    so that a second table is of all of them.
    """
    found = []
    for name in tasks:
        task = TASKS[name]()
        models = [_classifier(task, seed, kept) for seed in range(seeds)]
        measure = _accuracy(task, Vocabulary(task.texts))
        for words in (False, True):
            results = measured(models, measure, (2, 4, 8), folder, tables=words)
            table = _classifier_table(task, results, seeds, words)
            table.show()
            found.append(table)
    return found


def _classifier_table(task: Task, found: Found, seeds: int, words: bool) -> Table:
    heading = f"held-out accuracy, %: mean of {seeds} trainings (least to largest)"
    what = "linear layers and word tables" if words else "linear layers"
    title = f"{task.name}, {len(task.held_out_texts)} held-out texts, {what}"
    table = Table(title, ("weights", "bits a weight", heading))
    rows(table, found, ".2f")
    for grain in (Grain.TENSOR, Grain.BLOCK):
        gain, lead = (_gain(found, grain, equal) for equal in (False, True))
        where = "per tensor" if grain is Grain.TENSOR else "block 128"
        table.expect(
            f"INT2 {where}: split gains {gain:+.2f} points over plain weights of as many bits", gain > 0
        )
        table.expect(
            f"INT2 {where}: split gains at most {NOTHING} points over plain weights of its size: {lead:+.2f}",
            lead <= NOTHING,
        )
    return table


def _classifier(task: Task, seed: int, kept: Path) -> Path:
    path = kept / f"{task.name}_{seed}.onnx"
    if not path.is_file():
        say(f"training {path.stem}")
        trained(task, seed).save(path)
    return path


def _accuracy(task: Task, vocabulary: Vocabulary) -> Measure:
    ids = vocabulary.encode(task.held_out_texts)

    def measure(session: Any) -> float:
        parts = [session.run(None, {"ids": ids[at : at + BATCH]})[0] for at in range(0, len(ids), BATCH)]
        return 100 * float((np.concatenate(parts).argmax(1) == task.held_out_labels).mean())

    return measure


def _gain(found: Found, grain: Grain, equal: bool) -> float:
    """Return by how much 2-bit split weights lie above plain ones of the same bits, or of equal storage."""
    split = next(form for form in forms(2) if form.grain is grain and form.parts > 1)
    other = split.plain_at_equal_storage() if equal else Form(2, grain)
    return float(np.mean(found[split][1]) - np.mean(found[other][1]))


def subject_table(subject: Subject, what: str, folder: Path, form: str) -> Table:
    """The table of one model at INT2, INT3 and INT4. Nothing in it is random."""
    found = measured([subject.model], lambda session: subject.measure(session)[what], (2, 3, 4), folder)
    table = Table(subject.name, ("weights", "bits a weight", what))
    rows(table, found, form)
    sign = -1 if what == "perplexity" else 1
    for grain in (Grain.TENSOR, Grain.BLOCK):
        gain = sign * _gain(found, grain, equal=False)
        where = "per tensor" if grain is Grain.TENSOR else "block 128"
        table.expect(f"INT2 {where}: split is better than plain weights of the same bits", gain > 0)
    table.show()
    return table
