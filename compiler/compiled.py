# SPDX-License-Identifier: Apache-2.0
"""What `compile` returns: an artifact that still knows what it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from splitfold.compiler.search.found import Searched
from splitfold.compiler.source import Source
from splitfold.compiler.speed.outcome import Speed
from splitfold.passes.pipeline import PassRecord
from splitfold.runtime.artifact import Artifact

__all__ = ["Compiled"]


@dataclass(frozen=True, kw_only=True)
class Compiled(Artifact):
    """An artifact, fresh from `compile`.

    Attributes:
        records: the pass records, with times.
        source: the model before any pass, the feeds that the outputs were compared on, and the calibration
            data.
        search: what the search for the best model within a drop of the metric came to, where there was one.
        speed: how fast the model is beside the one that it was made from, where that was measured. It stands
            in no file: the same artifact has the same bytes on every machine.
    """

    records: tuple[PassRecord, ...]
    source: Source
    search: Searched | None = None
    speed: Speed | None = None

    def write_report(self, path: str | Path) -> Path:
        """Write a report of the compilation as one HTML file (replacing it) that needs no network, and return
        its path.

        Runs both models on a few batches. What cannot be had, such as the drift of a model that does not run
        here, is named in the report.

        Raises:
            ArtifactError: there is no such folder, or it cannot be written; what was there before remains.
            ReportError: plotly is not installed (`splitfold[report]`).
        """
        from splitfold.compiler.debug.report import write_report

        return write_report(self, path)
