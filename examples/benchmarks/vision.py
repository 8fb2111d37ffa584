# SPDX-License-Identifier: Apache-2.0
"""Static int8 of ResNet-20 on CIFAR-10 and MCUNet on photos, beside onnxruntime's quantize_static.

Run `python examples/benchmarks/vision.py`. Both quantizers see the same calibration images.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from splitfold.compiler import compile, presets
from splitfold.examples.benchmarks import data
from splitfold.examples.benchmarks.data import Feeds, Floats
from splitfold.examples.benchmarks.ort_quantizers import ort_static
from splitfold.examples.benchmarks.report import (
    Report,
    arguments,
    explain,
    interleaved,
    kernels,
    megabytes,
    open_bare,
    run_all,
    sqnr,
)

CALIBRATION = 128
DRAWS = 3
PHOTO_CALIBRATION = 32
BATCH = 20
ROUNDS = 30


@dataclass(frozen=True)
class Measured:
    """Outputs of one file on the test images."""

    path: Path
    logits: Floats
    seconds: float = 0.0

    @property
    def top1(self) -> npt.NDArray[np.int64]:
        """The winning class of each image."""
        return np.asarray(self.logits.argmax(-1), np.int64)


def measure(path: Path, test: list[Feeds], seconds: float = 0.0) -> Measured:
    """Run the file in plain onnxruntime over the test images."""
    return Measured(path, np.concatenate(run_all(open_bare(path), test)), seconds)


def quantize(model: Path, calibration: list[Feeds], folder: Path) -> tuple[Path, Path, float]:
    """Our int8 preset and onnxruntime's quantize_static: (our file, theirs, our seconds)."""
    start = time.perf_counter()
    artifact = compile(model, calibration=calibration, pipeline=presets.int8(), speed=None)
    seconds = time.perf_counter() - start
    explain(artifact)
    ours = artifact.save(folder / "ours") / "model.onnx"
    return ours, ort_static(model, folder / "theirs.onnx", calibration), seconds


def speed(report: Report, files: dict[str, Path], feed: Feeds) -> None:
    """Rows with the speed of each file over the first, and the kernels that ran."""
    sessions: dict[str, Any] = {name: open_bare(path) for name, path in files.items()}
    runs = {name: lambda s=session: s.run(None, feed) for name, session in sessions.items()}
    batch = len(next(iter(feed.values())))
    for name, timing in interleaved(runs, ROUNDS).items():
        where = "" if name == "fp32" else f"; {kernels(files[name])}"
        report.note(
            f"  {name}, batch {batch}",
            f"{timing}, {megabytes(files[name]):.2f} MB{where}",
        )


def resnet20(folder: Path) -> Report:
    """ResNet-20: accuracy on the 5,000 test images."""
    report = Report("ResNet-20, CIFAR-10 test_5k, int8")
    model = data.model("resnet20_cifar10.onnx")
    x, y = data.cifar10("test_5k")
    train, _ = data.cifar10("train_20k")
    calibration = data.batches("input", train[:CALIBRATION], BATCH)
    ours, theirs, seconds = quantize(model, calibration, folder)
    test = data.batches("input", x, 100)
    reference = measure(model, test)
    files = {
        "fp32": reference,
        "splitfold int8": measure(ours, test, seconds),
        "onnxruntime static": measure(theirs, test),
    }
    accuracy = {name: 100 * float((found.top1 == y).mean()) for name, found in files.items()}
    report.note("fp32 accuracy, %", f"{accuracy['fp32']:.2f}")
    report.check(
        "splitfold int8: accuracy drop, points",
        accuracy["fp32"] - accuracy["splitfold int8"],
        0.3,
        most=True,
        form=".2f",
    )
    report.note(
        "onnxruntime static: accuracy drop, points",
        f"{accuracy['fp32'] - accuracy['onnxruntime static']:.2f}",
    )
    for name, found in list(files.items())[1:]:
        agreement = 100 * float((found.top1 == reference.top1).mean())
        report.note(
            f"{name}: agreement with fp32, SQNR",
            f"{agreement:.2f} %, {sqnr([reference.logits], [found.logits]):.1f} dB",
        )
    report.note("splitfold int8: seconds to compile", f"{seconds:.1f}")
    for size in (1, 32):
        speed(report, {name: found.path for name, found in files.items()}, {"input": x[:size]})
    return report


def mcunet(folder: Path) -> Report:
    """MCUNet: agreement with fp32 on the 200 photos, over several draws of the calibration photos."""
    report = Report(f"MCUNet, 200 photos, int8, {PHOTO_CALIBRATION} calibration photos, {DRAWS} draws")
    model = data.model("mcunet_imagenet.onnx")
    x = (data.photos(176, 176) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    test = data.batches("input", x, BATCH)
    reference = measure(model, test)
    report.note("fp32 accuracy, %", f"{100 * float((reference.top1 == data.photo_labels()).mean()):.1f}")
    rng = np.random.default_rng(0)
    scores: dict[str, list[float]] = {"splitfold int8": [], "onnxruntime static": []}
    files = {}
    for draw in range(DRAWS):
        chosen = rng.permutation(len(x))[:PHOTO_CALIBRATION]
        place = folder / str(draw)
        place.mkdir()
        ours, theirs, seconds = quantize(model, data.batches("input", x[chosen], BATCH), place)
        unseen = np.setdiff1d(np.arange(len(x)), chosen)
        for name, path in (("splitfold int8", ours), ("onnxruntime static", theirs)):
            found = measure(path, test, seconds)
            same = found.top1 == reference.top1
            scores[name].append(100 * float(same.mean()))
            text = f"{scores[name][-1]:.1f} %, {100 * float(same[unseen].mean()):.1f} % of the unseen, "
            report.note(
                f"draw {draw}: {name}: agreement, SQNR",
                text + f"{sqnr([reference.logits], [found.logits]):.1f} dB",
            )
            files[name] = path
    mean = {name: float(np.mean(found)) for name, found in scores.items()}
    report.check(
        "splitfold int8: mean agreement, % (target: onnxruntime's)",
        mean["splitfold int8"],
        mean["onnxruntime static"],
        form=".2f",
    )
    speed(report, {"fp32": model, **files}, {"input": x[:1]})
    return report


def main() -> int:
    """Print both tables."""
    arguments(__doc__)
    missed = 0
    for make in (resnet20, mcunet):
        with tempfile.TemporaryDirectory() as folder:
            missed += make(Path(folder)).finish()
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
