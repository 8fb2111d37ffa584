# SPDX-License-Identifier: Apache-2.0
"""What the workers of other tools share. They run by path in environments without splitfold, so this file
reads nothing but the standard library and NumPy.

A job is a JSON file that names `model`, `result`, `calibration` (a folder of .npz files, one a batch) and
`options`, the worker's own. The last line that a worker prints is JSON: `seconds` and `processor` seconds of
the call itself (imports, reading and writing excluded), or `error`.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Clock", "Job", "answered", "batches", "samples"]

Job = dict[str, Any]


class Clock:
    """Wall and processor seconds (all threads) from its making to `stop`."""

    def __init__(self) -> None:
        self.wall, self.processor = -time.perf_counter(), -time.process_time()

    def stop(self) -> Clock:
        """Read it."""
        self.wall += time.perf_counter()
        self.processor += time.process_time()
        return self


def batches(folder: str) -> list[dict[str, Any]]:
    """The feeds of a folder, in the order of their names."""
    found = []
    for file in sorted(Path(folder).glob("*.npz")):
        with np.load(file) as archive:
            found.append({name: archive[name] for name in archive.files})
    return found


def samples(feeds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the batches one by one, without the columns that no row of an attention mask keeps."""
    found = []
    for feed in feeds:
        mask = feed.get("attention_mask")
        for row in range(len(next(iter(feed.values())))):
            kept = slice(None) if mask is None else slice(int(mask[row].sum()))
            found.append(
                {name: np.ascontiguousarray(array[row : row + 1, kept]) for name, array in feed.items()}
            )
    return found


def answered(work: Callable[[Job], Clock]) -> int:
    """Do the job that the command line names and print the answer; `work` writes the result and returns what
    its call took."""
    logging.disable(logging.WARNING)
    job: Job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answer: dict[str, Any]
    try:
        clock = work(job)
        answer = {"seconds": clock.wall, "processor": clock.processor}
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        answer = {"error": f"{type(error).__name__}: {lines[0]}"}
    print("\n" + json.dumps(answer))  # after the progress bars that some of them print
    return 0
