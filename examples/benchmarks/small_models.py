# SPDX-License-Identifier: Apache-2.0
"""Small trained models of many kinds: every preset compiles, verifies, and runs in plain onnxruntime.

Run `python examples/benchmarks/small_models.py`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from splitfold.compiler import compile, presets
from splitfold.examples.benchmarks import data
from splitfold.examples.benchmarks.data import Feeds, Floats
from splitfold.examples.benchmarks.report import (
    Report,
    arguments,
    explain,
    kernels,
    low_bit,
    megabytes,
    open_bare,
    say,
    sqnr,
)

PRESETS = ("exact", "int8-dynamic", "int8")
CALIBRATION = 16
TEST = 8


@dataclass(frozen=True)
class Subject:
    """A model, and inputs for calibration and comparison: real ones, but for sound."""

    name: str
    file: str
    feeds: Callable[[int], list[Feeds]]


def _one_by_one(name: str, x: Floats) -> list[Feeds]:
    return [{name: x[at : at + 1]} for at in range(len(x))]


def _sound(count: int) -> list[Feeds]:
    """Windows of 64 + 512 samples at 16 kHz: harmonics in noise, every fourth noise only."""
    rng = np.random.default_rng(0)
    time_axis = np.arange(576) / 16000
    found: list[Feeds] = []
    for at in range(count):
        pitch = rng.uniform(90, 250)
        voice = sum(np.sin(2 * np.pi * pitch * k * time_axis + rng.uniform(0, 6)) / k for k in range(1, 12))
        wave = (0.1 * voice if at % 4 else 0.0) + 0.01 * rng.standard_normal(576)
        state = 0.3 * np.tanh(rng.standard_normal((2, 1, 128)))
        found.append(
            {
                "input": np.asarray(wave, np.float32)[None],
                "state": state.astype(np.float32),
                "sr": np.array(16000, np.int64),
            }
        )
    return found


def _clothes(count: int) -> list[Feeds]:
    """Fashion-MNIST: of the size and range of the digits that the model knows."""
    with np.load(data.shared("data", "images", "fashion_mnist", "test.npz")) as archive:
        x = archive["x"][:count].reshape(-1, 1, 28, 28).astype(np.float32)
    return _one_by_one("input", ((x / 255 - np.float32(0.1307)) / np.float32(0.3081)).astype(np.float32))


SUBJECTS = (
    Subject("silero", "silero_vad_16k.onnx", _sound),
    Subject(
        "fastestdet",
        "fastestdet.onnx",
        lambda n: _one_by_one("input.1", data.photos(352, 352, n) / np.float32(255)),
    ),
    Subject(
        "ultraface",
        "ultraface_rfb320.onnx",
        lambda n: _one_by_one("input", (data.photos(320, 240, n) - np.float32(127)) / np.float32(128)),
    ),
    Subject(
        "super-resolution",
        "super_resolution.onnx",
        lambda n: _one_by_one("input", data.photos(224, 224, n, grey=True) / np.float32(255)),
    ),
    Subject("mnist", "mnist.onnx", _clothes),
)


def outputs(path: Path, feeds: list[Feeds]) -> list[list[npt.NDArray[np.float32]]]:
    """Every output of every feed, in plain onnxruntime."""
    session = open_bare(path)
    return [[np.asarray(array) for array in session.run(None, feed)] for feed in feeds]


def examine(report: Report, subject: Subject, preset: str, folder: Path) -> None:
    """One row: the preset compiles, and plain onnxruntime runs the saved file with finite outputs."""
    model = data.model(subject.file)
    feeds = subject.feeds(CALIBRATION + TEST)
    what = f"{subject.name}, {preset}"
    try:
        start = time.perf_counter()
        artifact = compile(
            model, calibration=feeds[:CALIBRATION], pipeline=presets.preset(preset), speed=None
        )
        seconds = time.perf_counter() - start
        path = artifact.save(folder / f"{subject.name}-{preset}") / "model.onnx"
        before, after = outputs(model, feeds[CALIBRATION:]), outputs(path, feeds[CALIBRATION:])
    except Exception as error:
        report.verdict(what, f"{type(error).__name__}: {str(error)[:300]}", "compiles, verifies, runs", False)
        return
    finite = all(np.isfinite(array).all() for arrays in after for array in arrays)
    quality = ", ".join(
        f"{sqnr(list(r), list(a)):.1f}"
        for r, a in zip(zip(*before, strict=True), zip(*after, strict=True), strict=True)
    )
    size = f"{megabytes(model):.2f} to {megabytes(path):.2f} MB"
    layers = f"{low_bit(artifact)} layers low-bit: {kernels(path)}" if preset != "exact" else "lossless"
    report.verdict(
        what, f"SQNR {quality} dB, {size}, {seconds:.1f} s; {layers}", "compiles, verifies, runs", finite
    )
    say(what)
    explain(artifact)


def main() -> int:
    """Print the table."""
    arguments(__doc__)
    report = Report("Small models: compile, verify, run in plain onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        for subject in SUBJECTS:
            for preset in PRESETS:
                examine(report, subject, preset, Path(folder))
    return int(report.finish() > 0)


if __name__ == "__main__":
    raise SystemExit(main())
