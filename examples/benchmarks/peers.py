# SPDX-License-Identifier: Apache-2.0
"""Whole int8 models of other tools beside ours: same model, same calibration data, timed in turns.

    python -m splitfold.examples.benchmarks.peers folder [--models minilm resnet18] [--rounds 31]

onnxruntime's quantizers run here, on the float model and on what onnxscript's fusions for onnxruntime make of
it; NNCF and AMD Quark run in environments of their own, which pip makes in `folder`. All files are opened in
bare onnxruntime on the CPU. Seconds are those of the call that quantizes; ours are the whole `compile`.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.ort_fusions import optimize_for_ort

from splitfold.compiler import compile, presets
from splitfold.examples.benchmarks.ort_quantizers import ort_dynamic, ort_static
from splitfold.examples.benchmarks.peer_subjects import SUBJECTS, Subject
from splitfold.examples.benchmarks.precision_peers import QUARK, QUARK_WORKER
from splitfold.examples.benchmarks.report import (
    Report,
    Timing,
    arguments,
    interleaved,
    megabytes,
    open_bare,
    say,
)
from splitfold.examples.benchmarks.weight_peers import REQUIREMENTS, Environment, Peer
from splitfold.examples.benchmarks.weight_subjects import BitFormat

OURS = "splitfold int8"
LINEAR = ("MatMul", "Gemm")
NNCF_WORKER = Path(__file__).with_name("peer_static_worker.py")
NNCF, QUARK_NAME = "NNCF", "Quark"
INT8 = BitFormat(8, 0)
ROUNDS = 31
LEVEL = 0.97
"""Of two that are this near to one another neither is called slower."""
BARS: Mapping[str, Mapping[str, float]] = {
    "minilm": {"8 x 128": 1.5, "1 x 32": 1.2},
    "vit-s": {"batch": 1.5},
    "bert-base": {"1 x": 1.5},
}
"""By model: how many times as fast as onnxruntime's best ours should be, by how a shape's name begins."""
NEAR = {"minilm": 0.997}
"""By model: the fidelity to reach; elsewhere it is that of the best of the others."""


@dataclass(frozen=True)
class Made:
    """One quantized file."""

    name: str
    path: Path
    seconds: float
    fidelity: float


def every(subject: Subject, folder: Path, scratch: Path) -> Iterator[Made]:
    """Ours and all others; one that fails is said and left out."""
    for name, call in {
        **_ours(subject, scratch),
        **_ort(subject, scratch),
        **_others(subject, folder),
    }.items():
        try:
            path, seconds = call()
            fidelity = subject.fidelity(open_bare(path))
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            say(f"{subject.name}: {name} fails: {type(error).__name__}: {lines[0][:200]}")
            continue
        say(f"{subject.name}: {name}: {fidelity:.4f} {subject.measure}, {seconds:.1f} s")
        yield Made(name, path, seconds, fidelity)


Call = Callable[[], tuple[Path, float]]


def _timed(call: Callable[[Path], Path], path: Path) -> Call:
    def run() -> tuple[Path, float]:
        start = time.perf_counter()
        made = call(path)
        return made, time.perf_counter() - start

    return run


def _ours(subject: Subject, folder: Path) -> dict[str, Call]:
    def preset(make: Callable[[], Any], path: Path) -> Path:
        artifact = compile(subject.model, calibration=subject.batches, pipeline=make(), reproducers=None)
        artifact.save_model(path)
        return path

    found = {OURS: _timed(lambda path: preset(presets.int8, path), folder / "ours.onnx")}
    if subject.transformer:
        dynamic = folder / "ours-dynamic.onnx"
        found["splitfold int8-dynamic"] = _timed(lambda path: preset(presets.int8_dynamic, path), dynamic)
    return found


def _ort(subject: Subject, folder: Path) -> dict[str, Call]:
    found: dict[str, Call] = {}
    for suffix, model in {"": subject.model, ", fused": _fused(subject, folder)}.items():
        if model is None:
            continue
        calls = {
            "static": lambda path, m=model: ort_static(m, path, subject.batches),
            "static, MatMul and Gemm": lambda path, m=model: ort_static(m, path, subject.batches, LINEAR),
            "dynamic": lambda path, m=model: ort_dynamic(m, path),
        }
        for name, call in calls.items():
            if subject.transformer or name == "static":
                full = f"onnxruntime {name}{suffix}"
                found[full] = _timed(call, folder / f"{full}.onnx".replace(" ", "-").replace(",", ""))
    return found


def _fused(subject: Subject, folder: Path) -> Path | None:
    """The float model after onnxscript's fusions, or None where there is nothing for them or they fail."""
    if not subject.transformer:
        return None
    path = folder / "fused.onnx"
    try:
        model, counts = optimize_for_ort(ir.load(subject.model))
        ir.save(model, path)
        open_bare(path)
    except Exception as error:
        say(f"{subject.name}: onnxscript's fusions fail: {str(error).splitlines()[0][:200]}")
        return None
    said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    say(f"{subject.name}: onnxscript fuses {said or 'nothing'}")
    return path


def _others(subject: Subject, folder: Path) -> dict[str, Call]:
    tools = {NNCF: (REQUIREMENTS, NNCF_WORKER), QUARK_NAME: (QUARK, QUARK_WORKER)}

    def call(name: str) -> tuple[Path, float]:
        requirements, worker = tools[name]
        environment = Environment(folder / name.lower(), requirements, worker)
        environment.install()
        peer = Peer(name, name.lower(), "", options={"transformer": subject.transformer})
        path, seconds, _ = environment.call(peer, subject, INT8, 0)
        return path, seconds

    return {name: functools.partial(call, name) for name in tools}


def compared(key: str, subject: Subject, made: Sequence[Made], report: Report, rounds: int) -> None:
    """All rows of one model."""
    ours = next((it for it in made if it.name == OURS), None)
    if ours is None:
        report.verdict(f"{subject.name}: {OURS}", "failed", "a model", False)
        return
    others = [it for it in made if not it.name.startswith("splitfold")]
    timings = {name: _times(subject.model, made, feeds, rounds) for name, feeds in subject.shapes.items()}
    for it in made:
        facts = f"{it.fidelity:.4f} {subject.measure}, {megabytes(it.path):.1f} MB, {it.seconds:.1f} s"
        report.note(f"{subject.name}: {it.name}", facts)
        for shape, found in timings.items():
            report.note(f"  {shape}", str(found[it.name]))
    for shape, found in timings.items():
        _speed_verdict(key, subject, shape, found, others, report)
    if others and subject.trained:
        least = NEAR.get(key, max(it.fidelity for it in others))
        report.check(f"{subject.name}: {OURS}, {subject.measure}", ours.fidelity, least)
    patient = [it for it in others if "static" in it.name or it.name == NNCF]
    if patient:
        fastest = min(patient, key=lambda it: it.seconds)
        report.verdict(
            f"{subject.name}: seconds to make",
            f"{ours.seconds:.1f}",
            f"<= {fastest.seconds:.1f} ({fastest.name})",
            ours.seconds <= fastest.seconds,
        )


def _times(model: Path, made: Sequence[Made], feeds: Mapping[str, Any], rounds: int) -> dict[str, Timing]:
    files = {"fp32": model, **{it.name: it.path for it in made}}
    runs = {}
    for name, path in files.items():
        session = open_bare(path)
        wanted = {value.name for value in session.get_inputs()}
        given = {key: array for key, array in feeds.items() if key in wanted}
        runs[name] = lambda s=session, f=given: s.run(None, f)
    return interleaved(runs, rounds)


def _speed_verdict(
    key: str,
    subject: Subject,
    shape: str,
    found: Mapping[str, Timing],
    others: Sequence[Made],
    report: Report,
) -> None:
    ours = found[OURS].ratio
    bar = next((bar for start, bar in BARS.get(key, {}).items() if shape.startswith(start)), LEVEL)
    rivals = {it.name: found[it.name].ratio for it in others}
    if bar > 1:
        rivals = {name: ratio for name, ratio in rivals.items() if name.startswith("onnxruntime")}
    if key == "tiny":
        rivals = {"fp32": 1.0}
    if not rivals:
        return
    best = max(rivals, key=lambda name: rivals[name])
    ratio = ours / rivals[best]
    report.verdict(f"{subject.name}: {OURS}, {shape}", f"{ratio:.2f}x {best}", f">= {bar:.2f}x", ratio >= bar)


def main() -> int:
    """Print the table of each model."""
    options = arguments(
        __doc__,
        ("folder", {"type": Path, "help": "where the tools' environments are made, or were"}),
        ("--models", {"nargs": "+", "choices": list(SUBJECTS), "default": list(SUBJECTS)}),
        ("--rounds", {"type": int, "default": ROUNDS, "help": "rounds of each latency measurement"}),
    )
    options.folder.mkdir(parents=True, exist_ok=True)
    missed = 0
    for key in options.models:
        with tempfile.TemporaryDirectory() as name:
            subject = SUBJECTS[key](Path(name))
            report = Report(f"{subject.name}, int8, by every tool")
            made = list(every(subject, options.folder.resolve(), Path(name)))
            compared(key, subject, made, report, options.rounds)
            missed += report.finish()
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
