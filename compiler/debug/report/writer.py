# SPDX-License-Identifier: Apache-2.0
"""Writing a report: collect, draw, and put the file in place whole or not at all."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from splitfold.compiler.compiled import Compiled
from splitfold.compiler.debug.report.collect import collect
from splitfold.compiler.debug.report.template import plotting_library, render
from splitfold.runtime.errors import ArtifactError
from splitfold.runtime.model_file import scratch_folder

__all__ = ["REPORT_FILE", "check_report", "write_report"]

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
"""Name of the report beside a model.onnx."""


def check_report(path: str | Path | None = None) -> None:
    """Raise what `write_report` would raise for `path`, or for a missing library, before any work is done.

    Raises:
        ArtifactError, ReportError: see `write_report`.
    """
    plotting_library()
    if path is None:
        return
    file = Path(path)
    if file.is_dir():
        raise ArtifactError(f"cannot write the report {file}: it is a folder.")
    if not file.parent.is_dir():
        raise ArtifactError(f"cannot write the report {file}: there is no folder {file.parent}.")


def write_report(compiled: Compiled, path: str | Path) -> Path:
    """Write the report of `compiled` as one HTML file (replacing it) that needs no network, and return its
    path.

    Runs both models on a few batches of the calibration data. What cannot be had, such as the drift of a
    model that does not run here, is named in the report.

    Raises:
        ArtifactError: there is no such folder, or it cannot be written; what was there before remains.
        ReportError: plotly is not installed (`splitfold[report]`).
    """
    check_report(path)
    file, start = Path(path), time.perf_counter()
    data = collect(compiled)
    collected = time.perf_counter()
    text = render(data)
    with scratch_folder(file) as scratch:
        written = scratch / file.name
        written.write_text(text, encoding="utf-8")
        written.replace(file)
    logger.info(
        "report %s: %.1f MB, collected in %.1f s, drawn in %.1f s",
        file,
        len(text) / 1e6,
        collected - start,
        time.perf_counter() - collected,
    )
    return file
