# SPDX-License-Identifier: Apache-2.0
"""The models of the mixed-precision benchmark: their calibration data, and what is measured."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from splitfold.examples.benchmarks import data
from splitfold.examples.benchmarks.data import Feeds, Floats, Labels, Pairs
from splitfold.examples.benchmarks.minilm import Encoder, capture, embed, spearman
from splitfold.examples.benchmarks.report import open_bare
from splitfold.examples.benchmarks.stories import Tokenizer, perplexity
from splitfold.examples.benchmarks.vit import spread
from splitfold.examples.benchmarks.weight_subjects import Subject
from splitfold.examples.training.small_vit import fashion

__all__ = ["SUBJECTS", "accuracy", "image_batches"]

CALIBRATED = 4
"""Batches of a seed: as many as the measuring signals look at."""
IMAGES, TESTED, TEST_BATCH = 32, 1000, 250
SENTENCES, PAIRS, PAIR_BATCH = 16, 300, 32
OPENINGS, TOKENS = 60, 200
QUICK = 8
"""A quick run measures on this fraction of the data."""


def accuracy(session: Any, images: Floats, labels: Labels) -> float:
    """Share of `images` that the model labels right, in percent."""
    name = session.get_inputs()[0].name
    starts = range(0, len(images), TEST_BATCH)
    found = [session.run(None, {name: images[at : at + TEST_BATCH]})[0].argmax(-1) for at in starts]
    return 100 * float((np.concatenate(found) == labels).mean())


def image_batches(images: Floats, name: str) -> Callable[[int], Sequence[Feeds]]:
    """Draws of calibration images."""

    def drawn(seed: int) -> Sequence[Feeds]:
        picks = np.random.default_rng(seed).permutation(len(images))[: CALIBRATED * IMAGES]
        return data.batches(name, images[np.sort(picks)], IMAGES)

    return drawn


def _classifier(
    name: str, model: Path, train: Floats, test: tuple[Floats, Labels], quick: bool, given: str
) -> Subject:
    count = TESTED // QUICK if quick else TESTED
    some = np.linspace(0, len(test[0]) - 1, count).astype(int)
    images, labels = test[0][some], test[1][some]

    def measure(session: Any) -> dict[str, float]:
        return {"accuracy, %": accuracy(session, images, labels)}

    return Subject(name, model, image_batches(train, given), measure, ())


def _trained_vit(folder: Path) -> Path:
    """Train the small ViT, once, and return its file."""
    file = folder / "small_vit.onnx"
    if file.is_file():
        return file
    command = [sys.executable, "-m", "splitfold.examples.training.small_vit", "-o", str(file)]
    subprocess.run(command, check=True)
    return file


def _vit(model: Path, quick: bool, name: str) -> Subject:
    return _classifier(name, model, fashion("train")[0], fashion("test"), quick, "image")


def _spread_vit(folder: Path, vit: Path | None, quick: bool) -> Subject:
    """The same function with channels of its norms' outputs that differ widely."""
    model = spread(vit or _trained_vit(folder), folder / "small_vit_spread.onnx")
    return _vit(model, quick, "small ViT, norms spread")


def _resnet20(quick: bool) -> Subject:
    train, test = data.cifar10("train_20k")[0], data.cifar10("test_5k")
    return _classifier("ResNet-20", data.model("resnet20_cifar10.onnx"), train, test, quick, "input")


def _minilm(folder: Path, quick: bool) -> Subject:
    encoder, whole = Encoder(), data.stsb("dev")
    picks = np.random.default_rng(0).permutation(len(whole.first))[: PAIRS // QUICK if quick else PAIRS]
    pairs = Pairs([whole.first[at] for at in picks], [whole.second[at] for at in picks], whole.gold[picks])
    model = folder / "minilm.onnx"
    if not model.is_file():
        capture(encoder, model)
    order = sorted(range(2 * len(picks)), key=lambda at: len(pairs.sentences[at]))  # little padding
    held_out = encoder.batches([pairs.sentences[at] for at in order], PAIR_BATCH)
    reference, texts = embed(open_bare(model), held_out), data.stsb("train").sentences

    def calibration(seed: int) -> Sequence[Feeds]:
        drawn = np.random.default_rng(seed).permutation(len(texts))[: CALIBRATED * SENTENCES]
        return encoder.batches([texts[at] for at in drawn], SENTENCES)

    def measure(session: Any) -> dict[str, float]:
        found = embed(session, held_out)
        cosine = float((found * reference).sum(1).mean())
        return {"Spearman x 100": 100 * spearman(found[np.argsort(order)], pairs), "cosine": cosine}

    return Subject("MiniLM", model, calibration, measure, ())


def _stories(quick: bool) -> Subject:
    tokenizer = Tokenizer.read(data.model("stories260K_tok512.bin"))
    ids = [np.array(tokenizer.encode(text)[:TOKENS], np.int64) for text in data.stories(3 * OPENINGS)]
    tested, rest = ids[: OPENINGS // QUICK if quick else OPENINGS], ids[OPENINGS:]
    whole = [text for text in rest if len(text) == TOKENS]

    def calibration(seed: int) -> Sequence[Feeds]:
        drawn = np.random.default_rng(seed).permutation(len(whole))[: 4 * CALIBRATED]
        return data.batches("ids", np.stack([whole[at] for at in drawn]), 4)

    def measure(session: Any) -> dict[str, float]:
        return {"perplexity": perplexity(session, tested)}

    return Subject("stories260K", data.model("stories260K.onnx"), calibration, measure, ())


SUBJECTS: Mapping[str, Callable[[Path, Path | None, bool], Subject]] = {
    "vit": lambda folder, vit, quick: _vit(vit or _trained_vit(folder), quick, "small ViT"),
    "vit-spread": lambda folder, vit, quick: _spread_vit(folder, vit, quick),
    "minilm": lambda folder, vit, quick: _minilm(folder, quick),
    "resnet20": lambda folder, vit, quick: _resnet20(quick),
    "stories": lambda folder, vit, quick: _stories(quick),
}
"""By name: made from a scratch folder, the file of the trained ViT or None, and whether to be quick."""
