# SPDX-License-Identifier: Apache-2.0
"""Time of each kernel, by ONNX Runtime's own profiler: models side by side, medians over interleaved runs."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from splitfold.runtime.errors import SessionError
from splitfold.runtime.feeds import Feeds
from splitfold.runtime.session import Session
from splitfold.runtime.target import Target
from splitfold.runtime.turns import turns

__all__ = ["KernelTime", "Trace", "read_events", "trace"]

_SUFFIX = "_kernel_time"
_NESTING = {"BeamSearch", "GreedySearch", "If", "Loop", "Sampling", "Scan"}
"""Operators whose time holds that of the nodes of their subgraphs."""

Event = Mapping[str, Any]


@dataclass(frozen=True)
class KernelTime:
    """What one node of the runtime's optimised graph took.

    Attributes:
        node: its name there.
        operator: its operator type.
        microseconds: median over the timed runs, of all its calls in a run (a body of a Loop has several),
            without the nodes of its subgraphs.
    """

    node: str
    operator: str
    microseconds: float


@dataclass(frozen=True)
class Trace:
    """One model's profile.

    Attributes:
        kernels: in order of execution.
        run_us: median wall time of a run in microseconds, the profiler's own cost included.
        outside_us: median of what a run spends outside kernels, in microseconds.
        runs: number of timed runs.
        graph: what was executed, without its weights' bytes.
    """

    kernels: tuple[KernelTime, ...]
    run_us: float
    outside_us: float
    runs: int
    graph: ir.Model


def trace(
    models: Sequence[ir.Model | str | Path],
    feeds: Feeds,
    *,
    runs: int = 30,
    warm_up: int = 5,
    threads: int = 0,
    target: Target | None = None,
) -> list[Trace]:
    """Profile `models` as deployed on the same feeds and return one `Trace` each, in order.

    The models take turns, see `splitfold.runtime.turns`.

    Args:
        models: models in memory or paths of ``.onnx`` files, with the same inputs.
        feeds: one set of inputs.
        runs: timed runs of each model.
        warm_up: runs of each before the first turn; not counted.
        threads: intra-operator threads; 0 is the runtime's choice.
        target: where they run.

    Raises:
        SessionError: a model does not open or run, or the profiler wrote nothing that can be read.
        ValueError: `runs` is not positive.
    """
    schedule, place = list(turns(len(models), runs)), (target or Target.cpu()).taking_turns()
    with tempfile.TemporaryDirectory(prefix="splitfold-profile-") as folder:
        sessions = [
            Session(model, place, threads=threads, profile=_folder(Path(folder) / f"model-{at}"))
            for at, model in enumerate(models)
        ]
        timed = [[False] * warm_up for _ in sessions]
        for session in sessions:
            for _ in range(warm_up):
                session.run(feeds)
        for at, count in schedule:
            for _ in range(1 + count):
                sessions[at].run(feeds)
            timed[at] += [False] + [True] * count
        return [
            _trace(*session.end_profiling(), counted)
            for session, counted in zip(sessions, timed, strict=True)
        ]


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _trace(file: Path, graph: ir.Model, timed: Sequence[bool]) -> Trace:
    try:
        events = list(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise SessionError(f"the runtime's profile {file} cannot be read: {error}") from error
    return read_events(events, timed, graph)


def read_events(events: Sequence[Event], timed: Sequence[bool], graph: ir.Model) -> Trace:
    """Return the medians over the runs that `timed` marks; `events` are those of the profiler's JSON file.

    Raises:
        SessionError: the file holds none of these runs.
    """
    found = sorted(
        (event for event in events if event.get("name") == "model_run"), key=lambda e: int(e["ts"])
    )
    windows = [window for window, counted in zip(found, timed, strict=False) if counted]
    if not windows:
        raise SessionError("the runtime's profile holds no run of the model.")
    times: defaultdict[str, list[int]] = defaultdict(list)
    operators: dict[str, str] = {}
    outside = []
    for window, inside in _split(windows, events):
        spent: defaultdict[str, int] = defaultdict(int)
        for event, own in _own_times(inside):
            name = str(event["name"]).removesuffix(_SUFFIX)
            operators.setdefault(name, str(event["args"].get("op_name", "?")))
            spent[name] += own
        for name, own in spent.items():
            times[name].append(own)
        outside.append(int(window["dur"]) - sum(spent.values()))
    kernels = tuple(
        KernelTime(name, operators[name], _median(times[name], len(windows))) for name in operators
    )
    run = statistics.median(int(window["dur"]) for window in windows)
    return Trace(kernels, run, statistics.median(outside), len(windows), graph)


def _median(found: Sequence[int], runs: int) -> float:
    """Return the median over `runs`; in the others the node (of a branch not taken) did not run."""
    return statistics.median([*found, *[0] * (runs - len(found))])


def _split(windows: Sequence[Event], events: Sequence[Event]) -> Iterator[tuple[Event, list[Event]]]:
    """Yield each run with the kernel events inside it, in order of their start."""
    kernels = [e for e in events if e.get("cat") == "Node" and str(e.get("name", "")).endswith(_SUFFIX)]
    kernels.sort(key=lambda event: (int(event["ts"]), -int(event["dur"])))
    at = 0
    for window in windows:
        start, end = int(window["ts"]), int(window["ts"]) + int(window["dur"])
        while at < len(kernels) and int(kernels[at]["ts"]) < start:
            at += 1
        first = at
        while at < len(kernels) and int(kernels[at]["ts"]) <= end:
            at += 1
        yield window, kernels[first:at]


def _own_times(events: Sequence[Event]) -> list[tuple[Event, int]]:
    """Return each event with its time in microseconds, less that of the events nested in it."""
    own = [int(event["dur"]) for event in events]
    around: list[tuple[int, int]] = []  # (end, position) of the control flow that runs
    for position, event in enumerate(events):
        start, end = int(event["ts"]), int(event["ts"]) + int(event["dur"])
        while around and around[-1][0] < end:
            around.pop()
        if around and start < around[-1][0]:
            own[around[-1][1]] -= int(event["dur"])
        if event["args"].get("op_name") in _NESTING:
            around.append((end, position))
    return [(event, max(time, 0)) for event, time in zip(events, own, strict=True)]
