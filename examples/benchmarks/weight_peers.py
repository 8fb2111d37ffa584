# SPDX-License-Identifier: Apache-2.0
"""Low-bit weights of other tools beside ours, on the same model, calibration data and measure.

    python -m splitfold.examples.benchmarks.weight_peers folder [--formats 4x32 4x128] [--char-gpt file]

The tools run in an environment of their own, made by pip; `weight_peer_worker.py` calls them there. Stored
bits are counted in both files by one function. Seconds are those of the call that quantizes, theirs without
imports, reading and writing, ours the sum over the passes that scale and quantize; beside it stands the whole
compilation, with its clean-up of the graph and its checks.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from splitfold.compiler import Tolerance, compile
from splitfold.examples.benchmarks.data import Feeds
from splitfold.examples.benchmarks.report import Report, arguments, open_bare, say, threads
from splitfold.examples.benchmarks.weight_bits import stored_bits
from splitfold.examples.benchmarks.weight_subjects import BitFormat, Subject, char_gpt, minilm, stories
from splitfold.passes.pipeline import Pipeline

__all__ = ["PEERS", "Environment", "Peer", "PeerError", "peer_rows"]

REQUIREMENTS = ("onnx==1.23.2", "onnxruntime==1.31.1", "onnx-ir==1.1.0", "nncf==3.4.0", "torch==2.13.0")
"""Releases that work together; torch is what onnxruntime's HQQ computes with."""
WORKER = Path(__file__).with_name("weight_peer_worker.py")
LIMIT = 1800
"""Seconds after which a call is given up."""
SAME_BITS = 0.02
"""Files whose bits a weight differ by no more are equal."""
SEARCHES = ("fold-scales", "quantize-weights")
AWQ = "awq scales and clip"
WEIGHTS = "quantize-weights{{method={method},bits={bits},block={block},symmetric={symmetric}}}"
SCALES = "fold-scales{{method=awq,bits={bits},block={block},symmetric={symmetric}}},"


class Calibrated(Protocol):
    """A model with calibration data; `model` is its file."""

    @property
    def name(self) -> str:
        """What tables call it."""

    @property
    def model(self) -> Path:
        """Its float file."""

    @property
    def calibration(self) -> Callable[[int], Sequence[Feeds]]:
        """Returns the batches of a seed."""


class PeerError(Exception):
    """A tool could not be installed, refused the model, or failed."""


@dataclass(frozen=True)
class Peer:
    """One way to call one tool.

    Attributes:
        name: what tables call it.
        method: of the worker.
        ours: our method that does the same kind of work with the same kind of data.
        bits: the widths it has; at others the row says so.
        symmetric: the zero point is fixed.
        float_zeros: its zero points take as many bits as its scales: ours are symmetric blocks of half the
            size, which store the same number of bits.
        search: more than rounding to nearest, so that its time is compared.
        options: its own.
        unless: the name of a peer before it; this one is called only where that one fails.
    """

    name: str
    method: str
    ours: str
    bits: tuple[int, ...] = (4,)
    symmetric: bool = False
    float_zeros: bool = False
    search: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    unless: str = ""

    def equal(self, form: BitFormat) -> str:
        """Our pipeline that stores as many bits."""
        method, scales = ("awq", SCALES) if self.ours == AWQ else (self.ours, "")
        return (scales + WEIGHTS).format(
            method=method,
            bits=form.bits,
            block=form.block // 2 if self.float_zeros else form.block,
            symmetric=str(self.symmetric or self.float_zeros).lower(),
        )


PEERS = (
    Peer("onnxruntime RTN", "ort-rtn", "rtn", (2, 3, 4, 8), search=False),
    Peer("onnxruntime RTN, symmetric", "ort-rtn", "rtn", (2, 4, 8), symmetric=True, search=False),
    Peer("onnxruntime HQQ", "ort-hqq", "mse", (2, 3, 4, 8), float_zeros=True),
    Peer("onnxruntime k-quant", "ort-k-quant", "mse"),
    Peer("onnxruntime GPTQ", "ort-gptq", "gptq"),
    Peer("onnxruntime GPTQ, symmetric", "ort-gptq", "gptq", symmetric=True, unless="onnxruntime GPTQ"),
    Peer("NNCF", "nncf", "rtn", search=False),
    Peer("NNCF AWQ", "nncf", AWQ, (2, 3, 4), options={"awq": True}),
    Peer("NNCF AWQ, symmetric", "nncf", AWQ, symmetric=True, options={"awq": True}),
    Peer("NNCF AWQ and scale estimation", "nncf", AWQ, options={"awq": True, "scale_estimation": True}),
    Peer(
        "NNCF AWQ and scale estimation, symmetric",
        "nncf",
        AWQ,
        symmetric=True,
        options={"awq": True, "scale_estimation": True},
    ),
)


@dataclass(frozen=True)
class Found:
    """What one file gave: numbers by name, bits a weight; of the call seconds, and processor seconds of all
    threads; seconds of the whole compilation."""

    values: Mapping[str, float]
    bits: float
    seconds: float
    processor: float
    whole: float = 0.0

    def __str__(self) -> str:
        return (
            f"{', '.join(f'{what} {value:.4f}' for what, value in self.values.items())}; {self.bits:.2f} bits"
        )


@dataclass
class Environment:
    """The peers' virtual environment and scratch files in `folder`; one found there is used again.

    Attributes:
        folder: absolute.
        requirements: what is installed.
        worker: the script that calls the tools.
        calibrated: folders of the batches written, by subject and seed.
    """

    folder: Path
    requirements: tuple[str, ...] = REQUIREMENTS
    worker: Path = WORKER
    calibrated: dict[tuple[str, int], Path] = field(default_factory=dict)

    @property
    def python(self) -> Path:
        """The interpreter of the environment."""
        folder = "Scripts" if sys.platform == "win32" else "bin"
        return self.folder / "environment" / folder / "python"

    @staticmethod
    def made(folder: Path, report: Report) -> Environment | None:
        """The environment in `folder`; None, and a row that says why, where it cannot be made."""
        environment = Environment(folder.resolve())
        try:
            environment.install()
        except PeerError as error:
            report.note("other tools", str(error)[:200])
            return None
        return environment

    def install(self) -> None:
        """Make the environment where it is not there yet.

        Raises:
            PeerError: pip fails.
        """
        done, wanted = self.folder / "installed.txt", "\n".join(self.requirements)
        if done.is_file() and done.read_text(encoding="utf-8") == wanted:
            return
        say(f"installing {', '.join(self.requirements)} in {self.folder}")
        self.folder.mkdir(parents=True, exist_ok=True)
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(self.folder / "environment")],
            [str(self.python), "-m", "pip", "install", "--quiet", *self.requirements],
        ):
            made = subprocess.run(command, capture_output=True, text=True)
            if made.returncode:
                lines = [line for line in made.stderr.splitlines() if "ERROR" in line] or [
                    made.stderr.strip()
                ]
                raise PeerError(f"not installed: {lines[0]}")
        done.write_text(wanted, encoding="utf-8")

    def calibration(self, subject: Calibrated, seed: int) -> Path:
        """The folder of the batches of `seed`, one .npz file each."""
        key = (subject.name, seed)
        if key not in self.calibrated:
            place = self.folder / "calibration" / f"{subject.name} {seed}".replace(" ", "-")
            place.mkdir(parents=True, exist_ok=True)
            for file in place.glob("*.npz"):
                file.unlink()
            for number, feeds in enumerate(subject.calibration(seed)):
                np.savez(place / f"{number:05d}.npz", **feeds)  # type: ignore[arg-type]
            self.calibrated[key] = place
        return self.calibrated[key]

    def call(self, peer: Peer, subject: Calibrated, form: BitFormat, seed: int) -> tuple[Path, float, float]:
        """Return the file that `peer` writes, and the seconds and processor seconds that it took.

        Raises:
            PeerError: it fails, with the first line of its error.
        """
        result = self.folder / "peer.onnx"
        job = {
            "model": str(subject.model),
            "result": str(result),
            "calibration": str(self.calibration(subject, seed)),
            "method": peer.method,
            "bits": form.bits,
            "block": form.block,
            "symmetric": peer.symmetric,
            "options": dict(peer.options),
        }
        file = self.folder / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        command = [str(self.python), str(self.worker), str(file)]
        try:
            made = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, cwd=self.folder)
        except subprocess.TimeoutExpired:
            raise PeerError(f"gave no result within {LIMIT} s") from None
        if made.returncode:
            raise PeerError(f"exit code {made.returncode}: {(made.stderr.strip().splitlines() or [''])[-1]}")
        answer = json.loads(made.stdout.splitlines()[-1])
        if "error" in answer:
            raise PeerError(answer["error"])
        return result, float(answer["seconds"]), float(answer["processor"])


def peer_rows(
    subject: Subject, form: BitFormat, environment: Environment, report: Report, *, seed: int = 0
) -> None:
    """Rows of every peer in one format, each with ours of the same kind behind it, timed right after it.

    Ours must be at least as accurate with no more stored bits and, where something is searched, in no more
    seconds.
    """
    ours: dict[str, Found] = {}
    done: set[str] = set()
    for peer in PEERS:
        if peer.unless in done:
            continue
        label = f"{subject.name} {form}: {peer.name}"
        if form.bits not in peer.bits:
            if not peer.unless:
                report.note(label, f"has no {form.bits} bits")
            continue
        try:
            theirs = _theirs(peer, subject, form, environment, seed)
        except PeerError as error:
            report.note(label, f"fails: {str(error)[:200]}")
            say(f"{label} fails: {error}")
            continue
        done.add(peer.name)
        text = peer.equal(form)
        if text not in ours:
            ours[text] = _ours(text, subject, environment.folder / "ours.onnx", seed)
        say(
            f"{label}: {theirs}; {theirs.seconds:.2f} s ({theirs.processor:.2f}); "
            f"ours: {ours[text]}; {ours[text].seconds:.2f} s ({ours[text].processor:.2f})"
        )
        _compare(label, peer.search, theirs, ours[text], text, report)


def _theirs(peer: Peer, subject: Subject, form: BitFormat, environment: Environment, seed: int) -> Found:
    file, seconds, processor = environment.call(peer, subject, form, seed)
    try:
        session = open_bare(file)
    except Exception as error:
        raise PeerError(f"its file does not load: {str(error).splitlines()[0]}") from error
    return Found(subject.measure(session), stored_bits(file, subject.model), seconds, processor)


def _ours(text: str, subject: Subject, file: Path, seed: int) -> Found:
    batches = subject.calibration(seed)
    start, processor = time.perf_counter(), time.process_time()
    artifact = compile(
        subject.model,
        calibration=batches,
        pipeline=Pipeline.parse(f"canonicalize,{text}"),
        tolerance=Tolerance(cosine=None),
        reproducers=None,
    )
    whole, processor = time.perf_counter() - start, time.process_time() - processor
    artifact.save_model(file)
    search = [record for record in artifact.records if record.text.startswith(SEARCHES)]
    seconds = sum(record.seconds for record in search)
    return Found(
        subject.measure(open_bare(file)), stored_bits(file, subject.model), seconds, processor, whole
    )


def _compare(label: str, search: bool, theirs: Found, ours: Found, text: str, report: Report) -> None:
    report.note(label, f"{theirs}; {theirs.seconds:.2f} s, of processors {theirs.processor:.2f} s")
    what, value = next(iter(ours.values.items()))
    least, falls = theirs.values[what], what == "perplexity"
    better = (value <= least if falls else value >= least) and ours.bits <= theirs.bits + SAME_BITS
    if better or ours.bits >= theirs.bits - SAME_BITS:
        target = f"{'<=' if falls else '>='} {least:.4f}, <= {theirs.bits:.2f} bits"
        report.verdict(f"  {text}", str(ours), target, better)
    else:
        report.note(f"  {text}, in fewer bits", str(ours))
    times = f"passes {ours.seconds:.2f} s; whole compilation {ours.whole:.2f} s, "
    times += f"of processors {ours.processor:.2f} s"
    if search:
        least_time = f"<= {theirs.seconds:.2f} s"
        report.verdict(f"  seconds, {threads()} threads", times, least_time, ours.seconds <= theirs.seconds)
    else:
        report.note(f"  seconds, {threads()} threads", times)


def main() -> int:
    """Print the rows of the peers alone."""
    options = arguments(
        __doc__,
        ("folder", {"type": Path, "help": "where their environment is made, or was"}),
        ("--formats", {"nargs": "*", "default": [], "metavar": "BITSxBLOCK", "help": "such as 4x32; all"}),
        ("--char-gpt", {"type": Path, "help": "the character GPT; without it that one is left out"}),
    )
    formats = [BitFormat(*map(int, text.split("x"))) for text in options.formats]
    report = Report("Low-bit weights of other tools, and ours at as many stored bits")
    environment = Environment.made(options.folder, report)
    if environment is not None:
        subjects = [stories(), minilm(environment.folder, quick=False)]
        subjects += [char_gpt(options.char_gpt)] if options.char_gpt else []
        for subject in subjects:
            for form in formats or subject.formats:
                peer_rows(subject, form, environment, report)
    return int(report.finish() > 0)


if __name__ == "__main__":
    raise SystemExit(main())
