# SPDX-License-Identifier: Apache-2.0
"""Mixed precision by every signal: what models are worth with its plans, and what the signal costs.

    python -m splitfold.examples.benchmarks.precision [--seeds 3] [--quick] [--vit small_vit.onnx]
        [--sections joint weights carriers picture] [--models vit vit-spread minilm resnet20 stories]
        [--signals sensitivity relevance ...] [--keep folder] [--output precision.md]

The models are the small ViT of `examples/training/small_vit.py` on Fashion-MNIST, which is trained first (6
minutes) where no file is given; the same function with channels that differ widely, as in a large ViT (see
vit.py); all-MiniLM-L6-v2 on 300 pairs of STS-Benchmark dev; ResNet-20 on CIFAR-10; stories260K on
TinyStories. A seed draws the calibration data, four batches, which all signals look at, and the random
numbers of the signals that have any; the test data stay the same. An importance counts alone, times the
error 4^-b of b bits, and times the measured error of each layer's own output; `every layer alike` is the
same with an importance of 1 for all layers. Seconds are those of the
processor, of all threads, so that other load on the machine does not count.

Sections: `joint` simulates weights and inputs of all layers in 2 to 8 bits at once; `weights` only the
weights, with inputs in 8 bits; `carriers` are real ones at half of what int8 stores; `picture` draws scores
and bits along the depth. `--keep` keeps what was measured: a run goes on where an earlier one ended.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import cache
from pathlib import Path

from splitfold.examples.benchmarks.precision_picture import depth_picture, panel
from splitfold.examples.benchmarks.precision_regimes import Regime, carriers, joint, weights_only
from splitfold.examples.benchmarks.precision_runs import Sample, grid_entries
from splitfold.examples.benchmarks.precision_subjects import SUBJECTS
from splitfold.examples.benchmarks.precision_tables import Grid, claim_table, grid_table, summary_table
from splitfold.examples.benchmarks.report import arguments, console, machine, say
from splitfold.examples.benchmarks.split_tables import Table, write_tables
from splitfold.examples.benchmarks.weight_subjects import Subject
from splitfold.passes.allocation import Allocation
from splitfold.passes.expected_loss import ErrorModel, expected_losses
from splitfold.passes.signals.table import SignalKind, make_signal

SECTIONS = ("joint", "weights", "carriers", "picture")
BUDGETS = (4, 3)
MORE_BUDGETS = {"stories": (5, 4, 3)}
"""stories260K is ruined by 3 bits whatever the plan."""
BLOCKS = ("w2", "w2-b128", "w4", "w4-b128", "int8-dynamic")
CARRIERS = {
    "vit": (*BLOCKS, "int8-static", "fp32"),
    "vit-spread": (*BLOCKS, "int8-static", "fp32"),
    "minilm": (*BLOCKS, "fp32"),
    "resnet20": ("int8-static", "fp32"),
    "stories": ("w2", "w2-b64", "w4", "w4-b64", "w8-b64", "fp32"),
}
CLAIMED = ("vit", "vit-spread")
DRAWN = ("minilm", "vit")
DRAWN_BITS = 4


def regime_of(section: str, name: str) -> Regime:
    """The regime of a section for one model."""
    budgets = MORE_BUDGETS.get(name, BUDGETS)
    if section == "joint":
        return joint(budgets)
    return weights_only(budgets) if section == "weights" else carriers(CARRIERS[name])


def picture(subjects: list[Subject], kind: SignalKind, folder: Path) -> str:
    """Scores of a signal and the bits that they buy, for each of `subjects`."""
    panels = []
    for subject in subjects:
        sample = Sample(subject, joint((DRAWN_BITS,)), 0, folder / "drawn.onnx")
        scores, _ = sample.scores(make_signal(kind))
        losses = expected_losses(scores, sample.subject, ErrorModel.MEASURED)
        allocation = Allocation(sample.subject, scores, losses)
        plan = allocation.within(list(sample.regime.limits(sample.subject).values()))
        title = f"{subject.name}: {kind.value} of each layer, and the bits it buys at {DRAWN_BITS} on average"
        panels.append(panel(title, allocation, plan))
    return depth_picture(panels, kind.value)


def run(options: argparse.Namespace, folder: Path) -> list[Table]:
    """All sections; the file is written after each table."""
    grids: dict[tuple[str, str], Grid] = {}
    tables: list[Table] = []

    @cache
    def subject(name: str) -> Subject:
        return SUBJECTS[name](folder, options.vit, options.quick)

    def written(table: Table) -> None:
        table.show()
        tables.append(table)
        write_tables(tables, options.output)

    for section in options.sections:
        if section == "picture":
            drawn = [subject(name) for name in DRAWN if name in options.models]
            options.picture.write_text(picture(drawn, options.drawn, folder), encoding="utf-8")
            say(f"written {options.picture}")
            continue
        for name in options.models:
            regime = regime_of(section, name)
            entries = grid_entries(
                subject(name), regime, options.signals, options.seeds, options.keep or folder
            )
            grids[section, name] = grid = Grid(subject(name).name, regime.title, entries)
            written(grid_table(grid))
    claimed = [grid for (section, name), grid in grids.items() if section == "joint" and name in CLAIMED]
    if claimed:
        written(claim_table(claimed))
    if grids:
        written(summary_table(list(grids.values())))
    return tables


def main() -> int:
    """Print and write the tables."""
    options = arguments(
        __doc__,
        ("--seeds", {"type": int, "default": 3, "help": "draws of the calibration data"}),
        ("--quick", {"action": "store_true", "help": "an eighth of the test data"}),
        ("--vit", {"type": Path, "help": "the trained ViT; without it one is trained"}),
        ("--sections", {"nargs": "+", "choices": SECTIONS, "default": SECTIONS}),
        ("--models", {"nargs": "+", "choices": list(SUBJECTS), "default": list(SUBJECTS)}),
        ("--signals", {"nargs": "+", "type": SignalKind, "default": list(SignalKind), "metavar": "SIGNAL"}),
        ("--keep", {"type": Path, "help": "folder that keeps what was measured"}),
        ("--output", {"type": Path, "default": Path("precision.md"), "help": "Markdown file to write"}),
        ("--picture", {"type": Path, "default": Path("precision.svg"), "help": "picture to write"}),
        ("--drawn", {"type": SignalKind, "default": SignalKind.RELEVANCE, "help": "signal of the picture"}),
    )
    if options.keep is not None:
        options.keep = options.keep / "quick" if options.quick else options.keep
        options.keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        tables = run(options, Path(name))
    console.print(machine(), soft_wrap=True)
    return int(any(not came for table in tables for _, came in table.verdicts))


if __name__ == "__main__":
    raise SystemExit(main())
