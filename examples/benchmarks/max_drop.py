# SPDX-License-Identifier: Apache-2.0
"""Is a drop that a search keeps also kept on images that it did not see? ResNet-20 on CIFAR-10.

    python -m splitfold.examples.benchmarks.max_drop [--seeds 3] [--drop 0.01] [--images 2500]

A seed splits the 5,000 test images into those that the search sees and those that judge its result. Two kinds
of choices: the real carriers, where the search may go down to int8 everywhere, and simulated 8, 6, 5, 4 and 3
bits of weights and inputs, where the metric really binds. Simulated layers count as packed codes.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from splitfold.compiler import Budget, Search, Session, compile
from splitfold.examples.benchmarks import data
from splitfold.examples.benchmarks.data import Floats, Labels
from splitfold.examples.benchmarks.report import Report, arguments, say

CALIBRATION = 128
BATCH = 250
CHOICES = {
    "real carriers": "fp32,int8-static",
    "simulated bits": "fp32,sim-w8a8,sim-w6a6,sim-w5a5,sim-w4a4,sim-w3a3",
}
Correct = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Images:
    """A metric: of each image whether its class is found."""

    images: Floats
    labels: Labels

    def __call__(self, session: Session) -> Correct:
        """One score an image."""
        starts = range(0, len(self.images), BATCH)
        feeds = ({session.inputs[0]: self.images[at : at + BATCH]} for at in starts)
        classes = [session.run(feed)[session.outputs[0]].argmax(-1) for feed in feeds]
        return np.asarray(np.concatenate(classes) == self.labels)


def splits(seed: int, seen: int) -> tuple[Images, Images]:
    """The images that the search sees, and the others."""
    images, labels = data.cifar10("test_5k")
    order = np.random.default_rng(seed).permutation(len(images))
    first, others = order[:seen], order[seen:]
    return Images(images[first], labels[first]), Images(images[others], labels[others])


def row(title: str, choices: str, seed: int, options: argparse.Namespace, report: Report) -> None:
    """One search, judged on the other images."""
    seen, unseen = splits(seed, options.images)
    start = time.perf_counter()
    train, _ = data.cifar10("train_20k")
    found = compile(
        data.model("resnet20_cifar10.onnx"),
        pipeline=f"assign-precision{{choices=[{choices}]}}",
        calibration=data.batches("input", train[:CALIBRATION], BATCH),
        evaluate=seen,
        budget=Budget(max_drop=options.drop),
        search=Search(seed=seed),
        reproducers=None,
    )
    if found.search is None:
        raise SystemExit("no search was made")
    say(f"{title}, seed {seed}: {found.search.statement}")
    before, after = unseen(Session(found.source.model)), unseen(found.session())
    lost, error = float(before.mean() - after.mean()), float((before * 1.0 - after).std() / len(after) ** 0.5)
    report.note(
        f"{title}, seed {seed}: what the search says",
        f"{found.search.best.judgement}; {found.search.best.cost_text}; {len(found.search.trials)} models, "
        f"{time.perf_counter() - start:.0f} s; {found.search.plan.counts()}",
    )
    report.check(
        f"{title}, seed {seed}: drop on {len(after):,} unseen images (standard error {error:.4f})",
        lost,
        options.drop,
        most=True,
    )


def main() -> int:
    """Print the table."""
    options = arguments(
        __doc__,
        ("--seeds", {"type": int, "default": 3, "help": "splits of the images"}),
        ("--drop", {"type": float, "default": 0.01, "help": "what the accuracy may lose"}),
        ("--images", {"type": int, "default": 2500, "help": "images that the search sees"}),
    )
    report = Report(f"ResNet-20, CIFAR-10: the smallest model that loses at most {options.drop:g}")
    for title, choices in CHOICES.items():
        for seed in range(options.seeds):
            row(title, choices, seed, options, report)
    return int(report.finish() > 0)


if __name__ == "__main__":
    raise SystemExit(main())
