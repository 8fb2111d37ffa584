# SPDX-License-Identifier: Apache-2.0
"""Layer splitting (SplitQuant) and outliers apart: accuracy beside stored bits, time beside the plain layer.

    python -m splitfold.examples.benchmarks.splitting [--seeds 5] [--models folder] [--output splitting.md]
        [--sections classifiers stories minilm chooser outliers latency]

The classifiers are two-layer encoders of hidden 128, trained here from scratch, one a seed; `--models` keeps
them. Rounding and clustering have no randomness, so the seeds are those of training. Accuracies of the first
three sections are simulated: rounded weights in a float file, activations in float, as no kernel holds
per-tensor weights of 2 bits. Those of the others are of files with low-bit kernels.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from splitfold.examples.benchmarks.report import arguments, console, machine
from splitfold.examples.benchmarks.split_accuracy import classifier_tables, subject_table
from splitfold.examples.benchmarks.split_latency import latency_table
from splitfold.examples.benchmarks.split_pipelines import chooser_table, outlier_tables
from splitfold.examples.benchmarks.split_tables import Table, write_tables
from splitfold.examples.benchmarks.weight_subjects import Subject, minilm, stories
from splitfold.examples.training.texts import TASKS

SECTIONS = ("classifiers", "stories", "minilm", "chooser", "outliers", "latency")
ROUNDS = 201


def main() -> int:
    """Print and write the tables."""
    options = arguments(
        __doc__,
        ("--seeds", {"type": int, "default": 5, "help": "trainings of each classifier"}),
        ("--tasks", {"nargs": "+", "choices": list(TASKS), "default": list(TASKS)}),
        ("--models", {"type": Path, "help": "folder that keeps the trained classifiers"}),
        ("--output", {"type": Path, "default": Path("splitting.md"), "help": "Markdown file to write"}),
        ("--sections", {"nargs": "+", "choices": SECTIONS, "default": SECTIONS}),
        ("--rounds", {"type": int, "default": ROUNDS, "help": "rounds of the latency measurement"}),
    )
    tables: list[Table] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        @cache
        def encoder() -> Subject:
            return minilm(folder, quick=True)

        for section in options.sections:
            if section == "classifiers":
                kept = options.models or folder
                kept.mkdir(parents=True, exist_ok=True)
                tables += classifier_tables(folder, kept, options.seeds, options.tasks)
            elif section == "stories":
                tables.append(subject_table(stories(), "perplexity", folder, ".3f"))
            elif section == "minilm":
                tables.append(subject_table(encoder(), "Spearman", folder, ".4f"))
            elif section == "chooser":
                tables.append(chooser_table(encoder(), folder))
            elif section == "outliers":
                tables += outlier_tables(encoder(), folder)
            else:
                tables.append(latency_table(folder, options.rounds))
            write_tables(tables, options.output)
    console.print(machine(), soft_wrap=True)
    return int(any(not came for table in tables for _, came in table.verdicts))


if __name__ == "__main__":
    raise SystemExit(main())
