# SPDX-License-Identifier: Apache-2.0
"""Other tools' mixed precision beside ours, each at as many stored bits.

    python -m splitfold.examples.benchmarks.precision_peers folder [--quick] [--signals sensitivity relevance]
        [--output precision_peers.md]

NNCF's `compress_weights` holds a share of the weights in 4 bits (blocks of 32) and the rest in 8, by one of
its five metrics: on MiniLM, ours by each signal with the same two precisions and no more stored bits. AMD
Quark gives activations of an int8 model 16 bits until its own measure reaches a threshold, for which the
runtime has no fast kernels: on ResNet-20, ours leaves layers of an int8 model in float, half a bit a weight
more. The tools run in environments of their own in `folder`, made by pip.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from splitfold.examples.benchmarks.precision_regimes import Regime
from splitfold.examples.benchmarks.precision_runs import TURNED, Sample, words
from splitfold.examples.benchmarks.precision_subjects import SUBJECTS
from splitfold.examples.benchmarks.report import arguments, console, machine, open_bare, sqnr
from splitfold.examples.benchmarks.split_tables import Table, write_tables
from splitfold.examples.benchmarks.weight_bits import stored_bits
from splitfold.examples.benchmarks.weight_peers import Environment, Peer, PeerError
from splitfold.examples.benchmarks.weight_subjects import BitFormat, Subject
from splitfold.passes.limits import Unit
from splitfold.passes.precision import Precision
from splitfold.passes.signals.table import SignalKind

NNCF_METRICS = (
    "WEIGHT_QUANTIZATION_ERROR",
    "HESSIAN_INPUT_ACTIVATION",
    "MEAN_ACTIVATION_VARIANCE",
    "MAX_ACTIVATION_VARIANCE",
    "MEAN_ACTIVATION_MAGNITUDE",
)
WITHOUT_DATA = NNCF_METRICS[:1]
FOUR = BitFormat(4, 32)
SHARE = 0.5
"""Share of the weights that NNCF is to hold in 4 bits."""
WEIGHT_CHOICES = ("w4", "w8-b128")
QUARK = ("amd-quark==0.13", "torch==2.13.0", "onnxruntime==1.28.0", "onnx==1.22.0")
QUARK_WORKER = Path(__file__).with_name("precision_quark_worker.py")
THRESHOLDS = (None, 30.0, 42.0)
"""dB that Quark's search aims at; None is int8 alone."""
FLOAT_BITS = 8.75
"""Stored bits a weight of ours beside Quark: int8 alone takes 8.2."""
UNSEEN = 1000
"""Seed of data that nothing was calibrated on."""
COLUMNS = ("plan by", "result", "stored bits a weight", "processor seconds")


def nncf_table(folder: Path, subject: Subject, signals: list[SignalKind]) -> Table:
    """4 and 8 bits of weights on MiniLM."""
    table = Table(f"{subject.name}: weights in 4 and 8 bits, NNCF with {SHARE:.0%} in 4", COLUMNS)
    environment, best, limit = Environment(folder / "nncf"), 0.0, 0.0
    environment.install()
    for metric in NNCF_METRICS:
        options = {"ratio": SHARE, "sensitivity_metric": metric, "data": metric not in WITHOUT_DATA}
        peer = Peer(f"NNCF {metric.lower()}", "nncf", "rtn", options=options)
        try:
            file, _, processor = environment.call(peer, subject, FOUR, 0)
            value, bits = subject.measure(open_bare(file)), stored_bits(file, subject.model)
        except PeerError as error:
            table.add(peer.name, f"fails: {str(error)[:160]}", "", "")
            continue
        table.add(peer.name, words(value), f"{bits:.2f}", f"{processor:.1f}")
        best, limit = max(best, value["cosine"]), max(limit, bits)
    choices = tuple(map(Precision.parse, WEIGHT_CHOICES))
    regime = Regime("nncf", "as many bits as NNCF", choices, {"bits": limit}, Unit.BITS)
    ours = _ours(table, subject, regime, signals, folder) if limit else {}
    ranked = sorted(ours, key=lambda name: -ours[name]["cosine"])
    for name in dict.fromkeys([*ranked[:1], *(name for name in ranked if name.startswith("relevance"))]):
        if TURNED not in name:
            came = ours[name]["cosine"] >= best
            table.expect(f"{name} is as close to fp32 as the best of NNCF, or closer", came)
    table.show()
    return table


def _ours(
    table: Table, subject: Subject, regime: Regime, signals: list[SignalKind], folder: Path
) -> dict[str, dict[str, float]]:
    """One row a contender of ours; what was measured by name."""
    sample, found = Sample(subject, regime, 0, folder / "planned.onnx"), {}
    for kind in signals:
        for name, entry in sample.entries(kind).items():
            for budget, value in entry.values.items():
                bits = f"{entry.bits[budget]:.2f}"
                table.add(f"splitfold, {name}", words(value), bits, f"{entry.seconds or 0:.1f}")
                found[name] = value
    return found


def quark_table(folder: Path, subject: Subject, signals: list[SignalKind]) -> Table:
    """int8 with some of ResNet-20 in higher precision."""
    table = Table(f"{subject.name}: int8 with some layers in higher precision", COLUMNS)
    environment = Environment(folder / "quark", QUARK, QUARK_WORKER)
    environment.install()
    near = _with_distance(subject)
    for threshold in THRESHOLDS:
        name = "Quark int8" if threshold is None else f"Quark, {threshold:g} dB"
        try:
            options = {"threshold": threshold}
            file, _, processor = environment.call(
                Peer(name, "quark", "", options=options), near, BitFormat(8, 0), 0
            )
        except PeerError as error:
            table.add(name, f"fails: {str(error)[:160]}", "", "")
            continue
        table.add(name, words(near.measure(open_bare(file))), wide(file), f"{processor:.1f}")
    choices = tuple(map(Precision.parse, ("int8-static", "fp32")))
    regime = Regime("quark", "int8 and fp32", choices, {"bits": FLOAT_BITS}, Unit.BITS, fixed=choices[:1])
    _ours(table, near, regime, signals, folder)
    table.show()
    return table


def _with_distance(subject: Subject) -> Subject:
    """The same with the signal to noise ratio of the outputs over other calibration data measured too."""
    feeds = subject.calibration(UNSEEN)
    whole = open_bare(subject.model)
    reference = [whole.run(None, feed)[0] for feed in feeds]

    def measure(session: Any) -> dict[str, float]:
        found = [session.run(None, feed)[0] for feed in feeds]
        return {**subject.measure(session), "dB": sqnr(reference, found)}

    return replace(subject, measure=measure)


def wide(file: Path) -> str:
    """How many of the quantized activations have 16 bits."""
    counts: Counter[str] = Counter()
    for node in ir.load(file).graph:
        if node.op_type == "QuantizeLinear" and node.inputs[2] is not None:
            counts[str(node.inputs[2].dtype)] += 1
    return (
        f"{sum(n for name, n in counts.items() if '16' in name)} of {sum(counts.values())} inputs in 16 bits"
    )


def main() -> int:
    """Print and write the tables."""
    options = arguments(
        __doc__,
        ("folder", {"type": Path, "help": "where the tools' environments are made, or were"}),
        ("--quick", {"action": "store_true", "help": "an eighth of the test data"}),
        ("--signals", {"nargs": "+", "type": SignalKind, "default": list(SignalKind), "metavar": "SIGNAL"}),
        ("--output", {"type": Path, "default": Path("precision_peers.md"), "help": "Markdown file"}),
    )
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        tables = tables_of(options, Path(name))
    write_tables(tables, options.output)
    console.print(machine(), soft_wrap=True)
    return int(any(not came for table in tables for _, came in table.verdicts))


def tables_of(options: argparse.Namespace, scratch: Path) -> list[Table]:
    """Both tables; a tool that cannot be installed is said and left out."""
    found = []
    for make, name in ((nncf_table, "minilm"), (quark_table, "resnet20")):
        try:
            found.append(
                make(options.folder.resolve(), SUBJECTS[name](scratch, None, options.quick), options.signals)
            )
        except PeerError as error:
            table = Table(f"{make.__name__.removesuffix('_table')}", COLUMNS)
            table.add("-", str(error), "", "")
            found.append(table)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
