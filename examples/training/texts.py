# SPDX-License-Identifier: Apache-2.0
"""Two small text classification tasks and the tokenizer of the encoder that learns them.

Emotion (six feelings) has a validation set of its own. The SMS Spam Collection has none: a fifth of its
distinct messages is held out, each label in proportion; a message that occurs twice stands on one side only.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from splitfold.examples.benchmarks.data import Labels, shared

__all__ = ["LENGTH", "TASKS", "Task", "Vocabulary", "emotion", "sms_spam"]

LENGTH = 64
WORDS = 8000
BUCKETS = 512
HELD_OUT = 0.2
SPLIT_SEED = 0
_TOKEN = re.compile(r"[a-z]+(?:'[a-z]+)?|[0-9]|[^\sa-z0-9]")


@dataclass(frozen=True, eq=False)
class Task:
    """Texts with labels 0..len(names) - 1, and others that are held out."""

    name: str
    names: tuple[str, ...]
    texts: list[str]
    labels: Labels
    held_out_texts: list[str]
    held_out_labels: Labels


def emotion() -> Task:
    """dair-ai emotion: 16,000 texts to train on, 2,000 held out (its validation set)."""

    def read(part: str) -> list[tuple[str, str]]:
        lines = shared("data", "text", "emotion", f"{part}.txt").read_text(encoding="utf-8").splitlines()
        found = (line.rpartition(";") for line in lines if line.strip())
        return [(text, label) for text, _, label in found]

    return _task("emotion", read("train"), read("val"))


def sms_spam() -> Task:
    """SMS Spam Collection: messages, a seeded fifth of the distinct ones held out."""
    path = shared("data", "text", "sms_spam", "SMSSpamCollection")
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    pairs = dict.fromkeys(
        (text.strip(), label) for label, _, text in (line.partition("\t") for line in lines)
    )
    known: dict[str, tuple[str, str]] = {}
    for text, label in pairs:
        known.setdefault(" ".join(_TOKEN.findall(text.lower())), (text, label))
    rows = [known[key] for key in np.random.default_rng(SPLIT_SEED).permutation(sorted(known)).tolist()]
    held_out = []
    for name in sorted({label for _, label in rows}):
        own = [row for row in rows if row[1] == name]
        held_out += own[: round(HELD_OUT * len(own))]
    kept = set(held_out)
    return _task("sms_spam", [row for row in rows if row not in kept], held_out)


def _task(name: str, train: Sequence[tuple[str, str]], held_out: Sequence[tuple[str, str]]) -> Task:
    names = tuple(sorted({label for _, label in train}))
    number = {label: at for at, label in enumerate(names)}

    def labels(rows: Sequence[tuple[str, str]]) -> Labels:
        return np.array([number[label] for _, label in rows], np.int64)

    texts, others = [text for text, _ in train], [text for text, _ in held_out]
    return Task(name, names, texts, labels(train), others, labels(held_out))


TASKS = {"emotion": emotion, "sms_spam": sms_spam}


class Vocabulary:
    """The most frequent words of the training texts; others share hashed buckets. 0 is padding."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = Counter(word for text in texts for word in _TOKEN.findall(text.lower()))
        frequent = sorted(
            (word for word in counts if counts[word] > 1), key=lambda word: (-counts[word], word)
        )
        self._ids = {word: 1 + at for at, word in enumerate(frequent[:WORDS])}

    def __len__(self) -> int:
        return 1 + len(self._ids) + BUCKETS

    def _id(self, word: str) -> int:
        found = self._ids.get(word)
        return 1 + len(self._ids) + zlib.crc32(word.encode()) % BUCKETS if found is None else found

    def encode(self, texts: Sequence[str]) -> Labels:
        """Ids int64 [texts, longest], at most LENGTH tokens of each, padded with 0."""
        rows = [[self._id(word) for word in _TOKEN.findall(text.lower())[:LENGTH]] for text in texts]
        ids = np.zeros((len(rows), max(1, *map(len, rows))), np.int64)
        for at, row in enumerate(rows):
            ids[at, : len(row)] = row
        return ids
