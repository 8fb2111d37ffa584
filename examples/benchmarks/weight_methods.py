# SPDX-License-Identifier: Apache-2.0
"""Low-bit weights by every method, and static int8 by every way to scale, the same calibration data for all.

    python -m splitfold.examples.benchmarks.weight_methods [--seeds 3] [--quick] [--char-gpt char_gpt.onnx]
        [--peers folder]

The models are all-MiniLM-L6-v2 on STS-Benchmark dev, stories260K on TinyStories, and the character GPT of
`examples/training/char_gpt.py`, which is trained first (14 minutes) where no file is given. A seed draws the
calibration data. Each row is the mean over seeds with the spread (highest minus lowest), and the seconds
that the passes took.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from splitfold.compiler import Tolerance, compile
from splitfold.examples.benchmarks.report import Report, arguments, open_bare, say
from splitfold.examples.benchmarks.weight_peers import Environment, peer_rows
from splitfold.examples.benchmarks.weight_subjects import BitFormat, Subject, char_gpt, minilm, stories
from splitfold.passes.pipeline import Pipeline

AWQ = "fold-scales{{method=awq,bits={bits},block={block}}}"
SMOOTH = "fold-scales{{min-gain=-100}}"
WEIGHTS = "quantize-weights{{method={method},bits={bits},block={block}}}"
RTN = "rtn"
BEST_AWQ = "awq scales and clip"
METHODS = {
    RTN: ("", "rtn"),
    "mse": ("", "mse"),
    "smoothquant, rtn": (SMOOTH, "rtn"),
    "awq scales": (AWQ, "rtn"),
    BEST_AWQ: (AWQ, "awq"),
    "gptq": ("", "gptq"),
    "gptq, act-order": ("", "gptq,act-order=true"),
    "awq scales, gptq, act-order": (AWQ, "gptq,act-order=true"),
}
"""Method of quantize-weights, and what is folded before it."""
DUAL = "dgq"
DUAL_FORMATS = (BitFormat(4, 32), BitFormat(4, 128), BitFormat(3, 128))
WITHOUT_DATA = (RTN, "mse")
SMOOTHEST = "smoothquant, alpha 0.8"
STATIC = {
    "no scales": "",
    "smoothquant, alpha 0.5": "fold-scales{alpha=0.5}",
    "smoothquant, alpha 0.65": "fold-scales",
    SMOOTHEST: "fold-scales{alpha=0.8}",
    "dgq percentile": "fold-scales{method=dgq}",
    "awq scales": "fold-scales{method=awq,bits=8}",
    "repq": "fold-scales{method=repq}",
}
STATIC_AIM = 0.997


@dataclass(frozen=True)
class Row:
    """What one pipeline gave: numbers by name, one a seed; seconds of its passes, one a seed."""

    found: Mapping[str, list[float]]
    seconds: list[float]

    def first(self) -> tuple[str, float]:
        """The measure that decides, and its mean."""
        name, values = next(iter(self.found.items()))
        return name, float(np.mean(values))

    def __str__(self) -> str:
        words = [
            f"{what} {np.mean(v):.4f}" + (f" ({np.ptp(v):.4f})" if len(v) > 1 else "")
            for what, v in self.found.items()
        ]
        return f"{', '.join(words)}; {np.mean(self.seconds):.1f} s"


@dataclass
class Bench:
    """Compiles and measures one model; a folded model is made once for all that quantize it."""

    subject: Subject
    seeds: int
    folder: Path
    folded: dict[tuple[str, int], tuple[Path, float]] = field(default_factory=dict)

    def compiled(self, model: Path, text: str, seed: int, file: Path) -> tuple[Path, float]:
        """Compile `model` by the pipeline `text` with the data of `seed`; return the file and the seconds."""
        artifact = compile(
            model,
            calibration=self.subject.calibration(seed),
            pipeline=Pipeline.parse(text),
            tolerance=Tolerance(cosine=None),
            reproducers=None,
        )
        return artifact.save_model(file), sum(record.seconds for record in artifact.records)

    def scaled(self, scales: str, seed: int) -> tuple[Path, float]:
        """The model with scales folded, and the seconds that took."""
        if not scales:
            return self.subject.model, 0.0
        if (scales, seed) not in self.folded:
            file = self.folder / f"{self.subject.name}-folded-{len(self.folded)}.onnx"
            self.folded[scales, seed] = self.compiled(
                self.subject.model, f"canonicalize,{scales}", seed, file
            )
        return self.folded[scales, seed]

    def row(self, scales: str, quantize: str, seeds: int) -> Row:
        """Fold, quantize and measure, once a seed."""
        found: dict[str, list[float]] = {}
        seconds = []
        for seed in range(seeds):
            base, spent = self.scaled(scales, seed)
            file, more = self.compiled(base, f"canonicalize,{quantize}", seed, self.folder / "quantized.onnx")
            seconds.append(spent + more)
            for name, value in self.subject.measure(open_bare(file)).items():
                found.setdefault(name, []).append(value)
        row = Row(found, seconds)
        say(f"{self.subject.name} {scales} {quantize}: {row}")
        return row


def weight_rows(bench: Bench, form: BitFormat, report: Report) -> None:
    """Rows of one format; at 3 bits AWQ's scales and clip must beat rounding to nearest."""
    methods = METHODS | ({"dgq": ("", DUAL)} if form in DUAL_FORMATS else {})
    rows = {}
    for name, (scales, method) in methods.items():
        numbers = {"bits": form.bits, "block": form.block}
        quantize = WEIGHTS.format(method=method, **numbers)
        seeds = 1 if name in WITHOUT_DATA else bench.seeds
        rows[name] = bench.row(scales.format(**numbers), quantize, seeds)
        report.note(f"{bench.subject.name} {form}: {name}", str(rows[name]))
    if form.bits == 3:
        (what, ours), (_, plain) = rows[BEST_AWQ].first(), rows[RTN].first()
        label = f"{bench.subject.name} {form}: {BEST_AWQ} against {RTN}"
        report.check(label, ours, plain, most=what == "perplexity")


def static_rows(bench: Bench, report: Report) -> None:
    """Rows of static int8: one grid for each activation, weights per channel."""
    for name, scales in STATIC.items():
        row = bench.row(scales, "quantize-activations", bench.seeds)
        report.note(f"{bench.subject.name} W8A8 static: {name}", str(row))
        if name == SMOOTHEST:
            report.check(f"{bench.subject.name} W8A8: {name}, cosine", row.first()[1], STATIC_AIM, form=".5f")


def trained(folder: Path) -> Path:
    """Train the character GPT and return its file."""
    file = folder / "char_gpt.onnx"
    command = [sys.executable, "-m", "splitfold.examples.training.char_gpt", "-o", str(file)]
    subprocess.run(command, check=True)
    return file


def main() -> int:
    """Print the table."""
    options = arguments(
        __doc__,
        ("--quick", {"action": "store_true", "help": "MiniLM in blocks of 32 only"}),
        ("--seeds", {"type": int, "default": 3, "help": "draws of the calibration data"}),
        ("--char-gpt", {"type": Path, "help": "the character GPT; without it one is trained"}),
        ("--peers", {"type": Path, "help": "other tools too, in an environment made in this folder"}),
    )
    report = Report(f"Low-bit weights, {options.seeds} draws of calibration data; mean (spread)")
    peers = None if options.peers is None else Environment.made(options.peers, report)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gpt = options.char_gpt or trained(folder)
        for subject in (stories(), char_gpt(gpt), minilm(folder, options.quick)):
            bench = Bench(subject, options.seeds, folder)
            found = subject.measure(open_bare(subject.model))
            report.note(f"{subject.name} fp32", ", ".join(f"{what} {v:.4f}" for what, v in found.items()))
            if subject.static:
                static_rows(bench, report)
            for form in subject.formats:
                weight_rows(bench, form, report)
                if peers is not None:
                    peer_rows(subject, form, peers, report)
    return int(report.finish() > 0)


if __name__ == "__main__":
    raise SystemExit(main())
