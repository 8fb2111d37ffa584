# SPDX-License-Identifier: Apache-2.0
"""What the benchmark scripts print: rows with a target and a verdict, and the machine; and how they time."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from rich.console import Console
from rich.table import Table

from splitfold.examples.benchmarks.data import Feeds
from splitfold.runtime.artifact import Artifact
from splitfold.runtime.session import optimized_graph
from splitfold.runtime.target import Target

PACKAGES = ("splitfold", "onnxruntime", "onnx", "onnx-ir", "numpy", "torch", "transformers")
WIDTH = 150
console = Console() if Console().is_terminal else Console(width=WIDTH)


@dataclass
class Report:
    """A table of results; `check` rows have a target, `note` rows are for comparison."""

    title: str
    rows: list[tuple[str, str, str, bool | None]] = field(default_factory=list)

    def check(self, what: str, value: float, target: float, *, most: bool = False, form: str = ".4f") -> None:
        """A row that passes where `value` is at least `target`, or with `most` at most it."""
        sign, passed = ("<=", value <= target) if most else (">=", value >= target)
        self.rows.append((what, format(value, form), f"{sign} {format(target, form)}", bool(passed)))

    def verdict(self, what: str, result: str, target: str, passed: bool) -> None:
        """A row whose verdict the caller found."""
        self.rows.append((what, result, target, passed))

    def note(self, what: str, result: str) -> None:
        """A row without a target."""
        self.rows.append((what, result, "", None))

    def finish(self) -> int:
        """Print the table and the machine; return the number of missed targets."""
        table = Table(title=self.title, title_justify="left")
        for heading in ("what", "result", "target", ""):
            table.add_column(heading, overflow="fold")
        for what, result, target, passed in self.rows:
            mark = {None: "", True: "[green]pass[/]", False: "[red]MISSED[/]"}[passed]
            table.add_row(what, result, target, mark)
        console.print(table)
        console.print(machine(), soft_wrap=True)
        return sum(passed is False for *_, passed in self.rows)


def say(text: str) -> None:
    """Print progress, so that a long run is seen to move."""
    console.print(f"[dim]{text}[/]", soft_wrap=True, highlight=False)


def machine() -> str:
    """CPU, threads and versions, in one line."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
        flags = next((line for line in lines if line.startswith("flags")), "")
        cpu += "".join(
            f", {name}"
            for name in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")
            if f" {name}" in flags
        )
    versions = ", ".join(f"{name} {version}" for name in PACKAGES if (version := _version(name)))
    return f"{cpu}; {threads()} threads; Python {platform.python_version()}; {versions}"


def threads() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def open_bare(path: Path) -> Any:
    """The model in a plain onnxruntime session, as a user without splitfold opens it.

    Its threads stop to spin when a run ends: else those of one session would slow down the next one in turn.
    """
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class Timing:
    """Median seconds of a run; its speed-up over the first run: median and quartiles over the rounds."""

    seconds: float
    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.ratio:.2f}x fp32 ({self.low:.2f} to {self.high:.2f}), {self.seconds * 1e3:.2f} ms"


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """The timing of each run, all of them timed in turn in each round; the first is fp32.

    Other load on the machine hits all of them alike; a ratio is taken in each round, then the median of them.
    Each round has an order of its own, drawn by a seed: who always runs behind a large model finds the caches
    emptied by it.
    """
    order, turns = list(runs), np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
        run()
    for _ in range(rounds):
        turns.shuffle(order)
        for name in order:
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
    base = np.array(times[next(iter(runs))])
    found = {}
    for name, seconds in times.items():
        low, middle, high = np.quantile(base / np.array(seconds), (0.25, 0.5, 0.75)).tolist()
        found[name] = Timing(statistics.median(seconds), middle, low, high)
    return found


def kernels(path: Path) -> str:
    """The low-bit kernels of the graph that the runtime really executes: ``36 DynamicQuantizeMatMul``."""
    target = Target.cpu()
    found = Counter(
        node.op_type
        for graph in optimized_graph(path, target).graphs()
        for node in graph
        if node.op_type in target.low_bit_kernels
    )
    return ", ".join(f"{count} {name}" for name, count in found.most_common()) or "none"


def megabytes(path: Path) -> float:
    """Size of a file in 10^6 bytes."""
    return path.stat().st_size / 1e6


def sqnr(reference: Sequence[npt.NDArray[Any]], actual: Sequence[npt.NDArray[Any]]) -> float:
    """Signal to quantization noise ratio in dB over all pairs of arrays."""
    noise = sum(
        float(np.sum(np.square(a.astype(np.float64) - r))) for r, a in zip(reference, actual, strict=True)
    )
    signal = sum(float(np.sum(np.square(r.astype(np.float64)))) for r in reference)
    return 10 * float(np.log10(signal / noise)) if noise and signal else float("inf")


def held(artifact: Artifact) -> set[str]:
    """The layers in low precision: those whose kernel was seen, and embedding tables, which have none."""
    realised = artifact.manifest["realised"]
    records = [record for record in artifact.records if record.text.startswith("quantize-")]
    applied = {layer for record in records for layer, _ in record.applied}
    return {layer for layer in applied if layer not in realised or realised[layer]["low_bit"]}


def left_in_float(artifact: Artifact) -> dict[str, str]:
    """The layers that no pass holds in low precision, each with the last reason given."""
    records = [record for record in artifact.records if record.text.startswith("quantize-")]
    reasons = {layer: reason for record in records for layer, reason in record.skipped}
    low = held(artifact)
    return {layer: reason for layer, reason in reasons.items() if layer not in low}


def low_bit(artifact: Artifact) -> str:
    """How many of the layers with weights are in low precision: ``38 of 39``."""
    low = len(held(artifact))
    return f"{low} of {low + len(left_in_float(artifact))}"


def explain(artifact: Artifact) -> None:
    """Print the layers that stayed in float, grouped by reason."""
    groups: dict[str, list[str]] = {}
    for layer, reason in left_in_float(artifact).items():
        groups.setdefault(reason, []).append(layer)
    for reason, layers in groups.items():
        say(f"  left in float: {', '.join(layers)}: {reason}")


def run_all(session: Any, feeds: Sequence[Feeds]) -> list[npt.NDArray[Any]]:
    """The first output of each of `feeds`."""
    return [np.asarray(session.run(None, feed)[0]) for feed in feeds]


def arguments(description: str | None, *extra: tuple[str, dict[str, Any]]) -> argparse.Namespace:
    """The command line: the options in `extra`."""
    parser = argparse.ArgumentParser(description=(description or "").strip().splitlines()[0])
    for name, settings in extra:
        parser.add_argument(name, **settings)
    return parser.parse_args()
