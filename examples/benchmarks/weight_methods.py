# SPDX-License-Identifier: Apache-2.0
"""Low-bit weights of all-MiniLM-L6-v2 and stories260K by every method, the same calibration data for all.

    python -m splitfold.examples.benchmarks.weight_methods [--seeds 3] [--quick]

A seed draws the calibration sentences. Each row is the mean over seeds, with the spread, of the cosine to the
float model's embeddings on STS-Benchmark dev (or of the perplexity), and the seconds.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from splitfold.compiler import Tolerance, compile
from splitfold.examples.benchmarks import data
from splitfold.examples.benchmarks.data import Feeds
from splitfold.examples.benchmarks.minilm import Encoder, capture, embed, spearman
from splitfold.examples.benchmarks.report import Report, arguments, open_bare, say
from splitfold.examples.benchmarks.stories import Tokenizer, perplexity
from splitfold.passes.pipeline import Pipeline

SENTENCES = 1024
BATCH = 16
OPENINGS = 60
TOKENS = 200
SCALES = "fold-scales{{method=awq,bits={bits},block={block}}},"
METHODS = {
    "rtn": "quantize-weights{{bits={bits},block={block}}}",
    "mse": "quantize-weights{{method=mse,bits={bits},block={block}}}",
    "awq scales": SCALES + "quantize-weights{{bits={bits},block={block}}}",
    "awq scales and clip": SCALES + "quantize-weights{{method=awq,bits={bits},block={block}}}",
    "gptq": "quantize-weights{{method=gptq,bits={bits},block={block}}}",
    "gptq, act-order": "quantize-weights{{method=gptq,act-order=true,bits={bits},block={block}}}",
}
DUAL = "quantize-weights{{method=dgq,bits={bits},block={block}}}"


@dataclass(frozen=True)
class Subject:
    """One model: how its calibration data is drawn, and what is measured of a file, by name."""

    name: str
    model: Path
    calibration: Callable[[int], Sequence[Feeds]]
    measure: Callable[[Any], dict[str, float]]
    formats: tuple[tuple[int, int], ...]


def minilm(folder: Path, quick: bool) -> Subject:
    """MiniLM on STS-Benchmark dev."""
    encoder, pairs = Encoder(), data.stsb("dev")
    model = capture(encoder, folder / "minilm.onnx")
    texts = data.stsb("train").sentences
    held_out = encoder.batches(pairs.sentences, 32)
    reference = embed(open_bare(model), held_out)

    def calibration(seed: int) -> Sequence[Feeds]:
        picks = np.random.default_rng(seed).permutation(len(texts))[:SENTENCES]
        return encoder.batches([texts[pick] for pick in picks], BATCH)

    def measure(session: Any) -> dict[str, float]:
        found = embed(session, held_out)
        return {"cosine": float((found * reference).sum(1).mean()), "Spearman": spearman(found, pairs)}

    formats = (
        ((4, 32), (3, 32), (2, 32)) if quick else ((4, 32), (4, 128), (3, 32), (3, 128), (2, 32), (2, 128))
    )
    return Subject("MiniLM", model, calibration, measure, formats)


def stories() -> Subject:
    """stories260K on openings that are not calibrated on."""
    tokenizer = Tokenizer.read(data.model("stories260K_tok512.bin"))
    texts = data.stories(3 * OPENINGS)
    ids = [np.array(tokenizer.encode(text)[:TOKENS], np.int64) for text in texts]

    def calibration(seed: int) -> Sequence[Feeds]:
        picks = OPENINGS + np.random.default_rng(seed).permutation(len(ids) - OPENINGS)[:OPENINGS]
        return [{"ids": ids[pick][None]} for pick in picks]

    def measure(session: Any) -> dict[str, float]:
        return {"perplexity": perplexity(session, ids[:OPENINGS])}

    return Subject("stories260K", data.model("stories260K.onnx"), calibration, measure, ((4, 32), (3, 32)))


def measured(
    subject: Subject, text: str, seeds: int, folder: Path
) -> tuple[dict[str, list[float]], list[float]]:
    """Return by name what was measured, one number a seed, and the seconds."""
    found: dict[str, list[float]] = {}
    seconds = []
    for seed in range(seeds):
        batches = subject.calibration(seed)
        start = time.perf_counter()
        artifact = compile(
            subject.model,
            calibration=batches,
            pipeline=Pipeline.parse(f"canonicalize,{text}"),
            tolerance=Tolerance(cosine=None),
            reproducers=None,
        )
        seconds.append(time.perf_counter() - start)
        file = artifact.save_model(folder / "quantized.onnx")
        for name, value in subject.measure(open_bare(file)).items():
            found.setdefault(name, []).append(value)
        notes = [note for record in artifact.records for note in record.notes if "bits a weight" in note]
        say(f"{subject.name} {text} seed {seed}: {found} {notes[0] if notes else ''}")
    return found, seconds


def rows(subject: Subject, seeds: int, folder: Path, report: Report) -> None:
    """Add the rows of one model; at 3 bits AWQ's scales and clip must beat rounding to nearest."""
    for bits, block in subject.formats:
        methods = METHODS | ({"dgq": DUAL} if bits == 4 and block == 128 else {})
        results = {}
        for name, template in methods.items():
            text = template.format(bits=bits, block=block)
            found, seconds = measured(subject, text, 1 if name in ("rtn", "mse") else seeds, folder)
            results[name] = found
            words = [f"{what} {np.mean(v):.4f} ({np.ptp(v):.4f})" for what, v in found.items()]
            report.note(
                f"{subject.name} W{bits} block {block}: {name}",
                f"{', '.join(words)}; {np.mean(seconds):.1f} s",
            )
        if bits == 3:
            _compared(subject, block, results, report)


def _compared(
    subject: Subject, block: int, results: dict[str, dict[str, list[float]]], report: Report
) -> None:
    what = next(iter(results["rtn"]))
    ours, plain = (float(np.mean(results[name][what])) for name in ("awq scales and clip", "rtn"))
    report.check(
        f"{subject.name} W3 block {block}: awq scales and clip against rtn",
        ours,
        plain,
        most=what == "perplexity",
    )


def main() -> int:
    """Print the table."""
    options = arguments(
        __doc__,
        ("--quick", {"action": "store_true", "help": "block 32 only"}),
        ("--seeds", {"type": int, "default": 3, "help": "draws of the calibration data"}),
    )
    report = Report(f"Low-bit weights, {options.seeds} draws of calibration data; mean (spread)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for subject in (stories(), minilm(folder, options.quick)):
            rows(subject, options.seeds, folder, report)
    return int(report.finish() > 0)


if __name__ == "__main__":
    raise SystemExit(main())
