# SPDX-License-Identifier: Apache-2.0
"""all-MiniLM-L6-v2 in int8 on OpenVINO: ours by ONNX Runtime's provider beside NNCF's in OpenVINO itself.

    python -m splitfold.examples.benchmarks.minilm_openvino folder [--rounds 31] [--threads 0]

It needs `splitfold[minilm,openvino]`. NNCF and OpenVINO run in an environment of their own in `folder`, made
by pip; the same OpenVINO release is inside the provider. Runs of both take turns, and the worker's are timed
there. All compute float operators in f32. Our file also runs in OpenVINO itself, which shows what the
provider costs; where the provider cannot be used, only so.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from splitfold.compiler import compile
from splitfold.compiler.realisation import Unrealised
from splitfold.examples.benchmarks import data
from splitfold.examples.benchmarks.data import Feeds, Floats
from splitfold.examples.benchmarks.minilm import (
    BATCH,
    CALIBRATION,
    CALIBRATION_BATCH,
    SHAPES,
    Encoder,
    capture,
    embed,
)
from splitfold.examples.benchmarks.report import Report, arguments, megabytes, open_bare, say
from splitfold.examples.benchmarks.weight_peers import Environment, PeerError
from splitfold.runtime.openvino import why_no_openvino
from splitfold.runtime.session import Session
from splitfold.runtime.target import CPU_PROVIDER, Target

REQUIREMENTS = ("openvino==2026.4.1", "nncf==3.4.0", "onnx==1.23.2")
WORKER = Path(__file__).with_name("minilm_openvino_worker.py")
ROUNDS, SENTENCES = 31, 512
NNCF, OURS, FLOAT = "NNCF int8, OpenVINO", "splitfold int8, provider", "fp32, provider"
OURS_THERE, OURS_CPU = "splitfold int8, OpenVINO", "splitfold int8 for the CPU provider"
Run = Callable[[], float]


class Worker:
    """The process with NNCF and OpenVINO."""

    def __init__(self, environment: Environment, folder: Path) -> None:
        self._folder = folder
        self._written: list[tuple[Feeds, Path]] = []
        self._process = subprocess.Popen(
            [str(environment.python), str(environment.worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, **job: Any) -> dict[str, Any]:
        """What a job gives.

        Raises:
            PeerError: it fails.
        """
        if self._process.stdin is None or self._process.stdout is None:
            raise PeerError("the worker has no pipes")
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline() or '{"error": "it ended"}')
        if "error" in answer:
            raise PeerError(str(answer["error"]))
        return answer

    def milliseconds(self, name: str, feeds: Feeds) -> float:
        """The time of one run, taken there."""
        return float(self.ask(run=name, feeds=str(self._file(feeds)))["milliseconds"])

    def states(self, name: str, feeds: Feeds) -> Floats:
        """The first output of one run."""
        result = self._folder / "states.npy"
        self.ask(run=name, feeds=str(self._file(feeds)), result=str(result))
        found: Floats = np.load(result)
        return found

    def _file(self, feeds: Feeds) -> Path:
        """The file that holds `feeds`, written at the first call."""
        for known, path in self._written:
            if known.keys() == feeds.keys() and all(known[name] is feeds[name] for name in feeds):
                return path
        path = self._folder / f"feeds-{len(self._written)}.npz"
        np.savez(path, **feeds)  # type: ignore[arg-type]
        self._written.append((feeds, path))
        return path

    def end(self) -> None:
        """Let it go."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(60)


class There:
    """What `embed` asks of a session, answered by the worker."""

    def __init__(self, worker: Worker, name: str, inputs: list[Any]) -> None:
        self._worker, self._name, self._inputs = worker, name, inputs

    def get_inputs(self) -> list[Any]:
        """The inputs of the model."""
        return self._inputs

    def run(self, _: None, feeds: Feeds) -> list[Floats]:
        """The outputs."""
        return [self._worker.states(self._name, feeds)]


class Here:
    """The same of a session of splitfold."""

    def __init__(self, session: Session, inputs: list[Any]) -> None:
        self._session, self._inputs = session, inputs

    def get_inputs(self) -> list[Any]:
        """The inputs of the model."""
        return self._inputs

    def run(self, _: None, feeds: Feeds) -> list[Floats]:
        """The outputs."""
        return list(self._session.run(feeds).values())


def compiled(model: Path, calibration: list[Feeds], target: Target, result: Path) -> float:
    """Write our int8 model for `target`, and return the seconds it took."""
    start = time.perf_counter()
    artifact = compile(model, calibration=calibration, target=target, speed=None, unrealised=Unrealised.KEEP)
    seconds = time.perf_counter() - start
    artifact.save_model(result)
    say(f"{result.stem}: {seconds:.1f} s, {megabytes(result):.1f} MB")
    return seconds


def races(runs: Mapping[str, Run], rounds: int) -> dict[str, Floats]:
    """Milliseconds of every run, by name; all take turns in each round."""
    for run in runs.values():
        run()
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(run())
    return {name: np.array(times, np.float32) for name, times in found.items()}


def latency(
    report: Report, sessions: Mapping[str, Session], worker: Worker, encoder: Encoder, rounds: int
) -> None:
    """Rows of the medians, and of the speed over NNCF's, round by round."""
    sentences = data.stsb("dev").sentences
    for batch, length in SHAPES:
        feeds = encoder.full_batch(sentences, batch, length)
        runs: dict[str, Run] = {
            name: partial(worker.milliseconds, name, feeds) for name in (NNCF, OURS_THERE)
        }
        for name, session in sessions.items():
            wanted = {key: feeds[key] for key in session.inputs}
            runs[name] = partial(timed, session, wanted)
        times = races(runs, rounds)
        for name, taken in times.items():
            ratio = float(np.median(times[NNCF] / taken))
            low, high = np.quantile(times[NNCF] / taken, (0.25, 0.75))
            label = f"{name}, {batch} x {length}"
            text = f"{ratio:.2f}x NNCF's ({low:.2f} to {high:.2f}), {float(np.median(taken)):.2f} ms"
            if name == (OURS if OURS in times else OURS_THERE):
                report.verdict(label, text, ">= 1.00x", ratio >= 1)
            else:
                report.note(label, text)


def timed(session: Session, feeds: Feeds) -> float:
    """The milliseconds of one run."""
    start = time.perf_counter()
    session.run(feeds)
    return (time.perf_counter() - start) * 1e3


def accuracy(report: Report, found: Mapping[str, Any], reference: Floats, batches: list[Feeds]) -> None:
    """Rows of the cosine to fp32; ours is held to NNCF's."""
    bar: float | None = None
    for name, session in found.items():
        cosine = (embed(session, batches) * reference).sum(1)
        mean, least = float(cosine.mean()), float(cosine.min())
        bar = mean if name == NNCF else bar
        if name == NNCF or bar is None:
            report.note(f"{name}: cosine", f"{mean:.5f}, min {least:.4f}")
        else:
            report.verdict(f"{name}: cosine", f"{mean:.5f}, min {least:.4f}", f">= {bar:.5f}", mean >= bar)


def targets() -> tuple[Target, str]:
    """What ours is compiled for, and why not for the provider itself."""
    reason = why_no_openvino()
    target = Target.openvino()
    if reason:  # the same carriers, verified on the CPU provider
        target = dataclasses.replace(target, provider=CPU_PROVIDER, compiles=False)
    return target, reason


def measure(report: Report, folder: Path, environment: Environment, options: Any) -> None:
    """All rows."""
    encoder = Encoder()
    model = capture(encoder, folder / "captured.onnx")
    calibration = encoder.batches(data.stsb("train").first[:CALIBRATION], CALIBRATION_BATCH)
    (folder / "calibration").mkdir()
    for number, feeds in enumerate(calibration):
        np.savez(folder / "calibration" / f"{number:05d}.npz", **feeds)  # type: ignore[arg-type]
    target, reason = targets()
    ours, cpu, nncf = (folder / name for name in ("openvino.onnx", "cpu.onnx", "nncf.xml"))
    report.note("splitfold int8 for OpenVINO: seconds", f"{compiled(model, calibration, target, ours):.1f}")
    compiled(model, calibration, Target.cpu(), cpu)
    worker = Worker(environment, folder)
    place = str(folder / "calibration")
    seconds = worker.ask(quantize=str(model), calibration=place, result=str(nncf))["seconds"]
    report.note("NNCF int8: seconds", f"{seconds:.1f}")
    for name, file in ((NNCF, nncf), (OURS_THERE, ours)):
        worker.ask(open=str(file), precision="f32", threads=options.threads, **{"as": name})
    sessions = {OURS_CPU: Session(cpu, threads=options.threads)}
    if reason:
        report.note("provider", reason)
    else:
        sessions |= {
            name: Session(file, target, threads=options.threads)
            for name, file in ((FLOAT, model), (OURS, ours))
        }
        report.note("placement", str(sessions[OURS].placement))
    batches = encoder.batches(data.stsb("dev").sentences[: options.sentences], BATCH)
    whole = open_bare(model)
    inputs = whole.get_inputs()
    found: dict[str, Any] = {name: There(worker, name, inputs) for name in (NNCF, OURS_THERE)}
    found |= {name: Here(session, inputs) for name, session in sessions.items()}
    accuracy(report, found, embed(whole, batches), batches)
    latency(report, sessions, worker, encoder, options.rounds)
    worker.end()


def main() -> int:
    """Print the table."""
    options = arguments(
        __doc__,
        ("folder", {"type": Path, "help": "where the environment of NNCF and OpenVINO is made, or was"}),
        ("--rounds", {"type": int, "default": ROUNDS, "help": "rounds of the latency measurement"}),
        ("--threads", {"type": int, "default": 0, "help": "of a run; 0 is each runtime's choice"}),
        ("--sentences", {"type": int, "default": SENTENCES, "help": "of the dev set, for the cosine"}),
    )
    report = Report("all-MiniLM-L6-v2 int8 on OpenVINO, 128 calibration sentences of STS-Benchmark")
    environment = Environment(options.folder.resolve(), REQUIREMENTS, WORKER)
    try:
        environment.install()
        with tempfile.TemporaryDirectory() as name:
            measure(report, Path(name), environment, options)
    except PeerError as error:
        report.note("NNCF and OpenVINO", str(error)[:200])
    return int(report.finish() > 0)


if __name__ == "__main__":
    raise SystemExit(main())
