# SPDX-License-Identifier: Apache-2.0
"""Progress bars for passes and calibration on a terminal; silent elsewhere."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import onnx_ir as ir
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars

from splitfold.compiler.search.found import Trial
from splitfold.passes.base import Pass
from splitfold.passes.pipeline import PassRecord
from splitfold.runtime.calibration import Calibration

__all__ = ["Progress"]

T = TypeVar("T")


class Progress:
    """Observer that draws a bar over the passes, one over calibration batches while they are walked, and one
    over the evaluations of a search.

    Give it to `compile` in a ``with`` block, so that the bars go also where compilation fails::

        with Progress() as progress:
            compile(model, calibration=progress.watch("calibration.npz"), observers=[progress])

    Args:
        console: where to draw; default standard error. Nothing is drawn where it is no terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        shown = console or Console(stderr=True)
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=shown,
            transient=True,
            disable=not shown.is_terminal,
        )
        self._passes = self._bars.add_task("passes", total=None, visible=False)
        self._trials: TaskID | None = None
        self._now = "reading"
        self._batches: int | None = None

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bars away."""
        self._bars.stop()

    def watch(self, source: object) -> object:
        """Return `source`, calibration data in any form that `compile` takes, so that its walks are drawn."""
        if isinstance(source, Calibration | str | Path):
            return self._drawn(Calibration.of(source))
        if isinstance(source, Mapping | Iterator) or not (callable(source) or isinstance(source, Iterable)):
            return source  # one batch, or nothing that can be walked twice: `compile` says so
        return lambda: self._walk(iter(source if isinstance(source, Iterable) else source()))

    def _drawn(self, data: Calibration) -> Calibration:
        resized = data.resized
        if resized is None:
            return Calibration(lambda: self._walk(iter(data)))
        return Calibration(lambda: self._walk(iter(data)), lambda size: self._walk(resized(size)))

    def _walk(self, batches: Iterator[T]) -> Iterator[T]:
        task = self._bars.add_task(f"calibration batches ({self._now})", total=self._batches)
        count = 0
        try:
            for batch in batches:
                yield batch
                count += 1
                self._bars.advance(task)
            self._batches = count
        finally:
            self._bars.remove_task(task)

    def after_trial(self, trial: Trial, evaluations: int, limit: int) -> None:
        """Show how many models were evaluated, and how the last one does."""
        if self._trials is None:
            self._trials = self._bars.add_task("evaluations", total=limit)
        text = f"evaluations ({trial.judgement})"
        self._bars.update(self._trials, description=text, completed=evaluations)

    def before_pass(self, step: Pass, model: ir.Model, index: int, total: int) -> None:
        """Show which pass runs."""
        if not self._bars.live.is_started and not self._bars.disable:
            self._bars.start()
        self._now = step.name
        if self._trials is not None:
            self._bars.remove_task(self._trials)
            self._trials = None
        self._bars.update(self._passes, description=step.name, completed=index, total=total, visible=True)

    def after_pass(self, step: Pass, model: ir.Model, record: PassRecord) -> PassRecord:
        """Advance; after the last pass the bars go."""
        self._now = "verification"
        self._bars.advance(self._passes)
        task = self._bars.tasks[0]
        if task.total is not None and task.completed >= task.total:
            self._bars.stop()
        return record
