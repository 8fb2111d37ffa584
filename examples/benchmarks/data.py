# SPDX-License-Identifier: Apache-2.0
"""Where the measured models and data are, and how they are read.

They belong to their authors and are not part of the project: the folder ``shared`` beside the project holds
them, or the one that the environment variable SPLITFOLD_SHARED names.
"""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Feeds = dict[str, npt.NDArray[Any]]

CIFAR_MEAN = (0.485, 0.456, 0.406)
CIFAR_STD = (0.229, 0.224, 0.225)


def project() -> Path:
    """The project's root folder."""
    return Path(__file__).resolve().parents[2]


def shared(*parts: str) -> Path:
    """A file or folder of the shared material; a clear message and exit code 2 where it is absent."""
    base = Path(os.environ.get("SPLITFOLD_SHARED") or project().parent / "shared")
    place = base.joinpath(*parts)
    if not place.exists():
        print(
            f"This benchmark reads {'/'.join(parts) or 'models and data'} from {base}, which is not there.\n"
            "Set SPLITFOLD_SHARED to the folder that holds models/ and data/."
        )
        raise SystemExit(2)
    return place


def model(name: str) -> Path:
    """The file of a shared model."""
    return shared("models", name)


@dataclass(frozen=True)
class Pairs:
    """Sentence pairs with their gold similarity in 0..5."""

    first: list[str]
    second: list[str]
    gold: Floats

    @property
    def sentences(self) -> list[str]:
        """All sentences, first ones before second ones."""
        return [*self.first, *self.second]


def stsb(part: str) -> Pairs:
    """STS-Benchmark: `part` is ``train`` or ``dev``."""
    with shared("data", "text", "stsb", f"{part}.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if len(row) >= 7]
    gold = np.array([float(row[4]) for row in rows], np.float32)
    return Pairs([row[5] for row in rows], [row[6] for row in rows], gold)


def stories(count: int) -> list[str]:
    """The first `count` stories of the TinyStories sample."""
    text = shared("data", "text", "tinystories", "sample.txt").read_text(encoding="utf-8")
    parts = (part.strip() for part in text.split("<|endoftext|>"))
    return [part for part in parts if part][:count]


def cifar10(part: str) -> tuple[Floats, Labels]:
    """CIFAR-10 as ResNet-20 reads it, [n, 3, 32, 32], and labels; `part`: ``train_20k`` or ``test_5k``."""
    with np.load(shared("data", "images", "cifar10", f"{part}.npz")) as archive:
        x, y = archive["x"], archive["y"].astype(np.int64)
    scaled = (x.astype(np.float32) / 255 - np.array(CIFAR_MEAN, np.float32)) / np.array(CIFAR_STD, np.float32)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)), y


def photo_files() -> list[Path]:
    """The 200 photos, in the order of their label file."""
    folder = shared("data", "images", "imagenet_compatible")
    with (folder / "labels.csv").open(encoding="utf-8", newline="") as file:
        return [folder / "images" / row["file"] for row in csv.DictReader(file)]


def photo_labels() -> Labels:
    """ImageNet labels 0..999 of the photos."""
    with shared("data", "images", "imagenet_compatible", "labels.csv").open(
        encoding="utf-8", newline=""
    ) as file:
        return np.array([int(row["label"]) for row in csv.DictReader(file)], np.int64)


def photos(width: int, height: int, count: int | None = None, *, grey: bool = False) -> Floats:
    """Photos after a plain bilinear resize: float32 [n, 3 (1 if grey), height, width] in 0..255."""
    from PIL import Image

    found = []
    for file in photo_files()[:count]:
        with Image.open(file) as image:
            resized = image.convert("L" if grey else "RGB").resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.asarray(resized, np.float32)
        found.append(pixels[None] if grey else pixels.transpose(2, 0, 1))
    return np.ascontiguousarray(np.stack(found))


def batches(name: str, x: Floats, size: int) -> list[Feeds]:
    """`x` cut along its first axis into feeds of `size` samples for the input `name`."""
    return [{name: x[start : start + size]} for start in range(0, len(x), size)]
