# SPDX-License-Identifier: Apache-2.0
"""The models that weight methods are compared on: how each draws calibration data, and what is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from splitfold.examples.benchmarks import data
from splitfold.examples.benchmarks.data import Feeds, Pairs
from splitfold.examples.benchmarks.minilm import Encoder, capture, embed, spearman
from splitfold.examples.benchmarks.report import open_bare
from splitfold.examples.benchmarks.stories import Tokenizer, log_loss, perplexity
from splitfold.examples.training.char_gpt import CONTEXT, characters

SENTENCES = 1024
BATCH = 16
OPENINGS = 60
TOKENS = 200
WINDOWS = 192
THIRD = 3
"""Step through the pairs of STS-Benchmark dev: 500 of them, of all its sources."""
CALIBRATION_WINDOWS = 64


@dataclass(frozen=True)
class BitFormat:
    """Weights of so many bits, in blocks of so many rows that share a scale."""

    bits: int
    block: int

    def __str__(self) -> str:
        return f"W{self.bits} block {self.block}"


@dataclass(frozen=True)
class Subject:
    """One model.

    Attributes:
        name: what tables call it.
        model: the float file.
        calibration: the batches of a seed.
        measure: opened session -> what is measured, by name; the first decides. ``perplexity`` falls, all
            others rise.
        formats: what its weights are held in.
        static: whether rows of static int8 are made too.
    """

    name: str
    model: Path
    calibration: Callable[[int], Sequence[Feeds]]
    measure: Callable[[Any], dict[str, float]]
    formats: tuple[BitFormat, ...]
    static: bool = False


def minilm(folder: Path, quick: bool) -> Subject:
    """all-MiniLM-L6-v2 on every third pair of STS-Benchmark dev, calibrated on sentences of train."""
    encoder, whole = Encoder(), data.stsb("dev")
    pairs = Pairs(whole.first[::THIRD], whole.second[::THIRD], whole.gold[::THIRD])
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

    blocks = (32,) if quick else (32, 128)
    formats = tuple(BitFormat(bits, block) for bits in (4, 3, 2) for block in blocks)
    return Subject("MiniLM", model, calibration, measure, formats, static=True)


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

    formats = (BitFormat(4, 32), BitFormat(3, 32))
    return Subject("stories260K", data.model("stories260K.onnx"), calibration, measure, formats)


def char_gpt(model: Path) -> Subject:
    """The character GPT that `examples/training/char_gpt.py` writes: held-out text, windows in a row."""
    text, held_out, _ = characters()
    windows = held_out[: WINDOWS * (CONTEXT + 1)].reshape(WINDOWS, CONTEXT + 1)

    def calibration(seed: int) -> Sequence[Feeds]:
        starts = np.random.default_rng(seed).integers(0, len(text) - CONTEXT, (CALIBRATION_WINDOWS // 8, 8))
        return [
            {"ids": np.stack([text[start : start + CONTEXT] for start in eight]).astype(np.int64)}
            for eight in starts
        ]

    def measure(session: Any) -> dict[str, float]:
        found = [log_loss(session, window) for window in windows]
        return {"perplexity": math.exp(sum(loss for loss, _ in found) / sum(count for _, count in found))}

    return Subject("character GPT", model, calibration, measure, (BitFormat(4, 32), BitFormat(3, 32)))
