# SPDX-License-Identifier: Apache-2.0
"""NNCF and OpenVINO, in an environment of their own: `minilm_openvino.py` starts this file and talks to it.

    python minilm_openvino_worker.py

Each line on standard input is a job, each line on standard output its answer, both JSON:
`{"quantize": model.onnx, "calibration": folder of .npz, "result": model.xml}` gives `seconds` of NNCF's call;
`{"open": file, "as": name, "precision": "f32", "threads": 0}` compiles an .onnx or .xml;
`{"run": name, "feeds": file.npz}` gives the `milliseconds` of one run, and writes its first output to
`result`, an .npy, where one is named. A job that fails gives `error`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

Feeds = dict[str, Any]
Job = dict[str, Any]


def read(file: str) -> Feeds:
    """The arrays of an .npz by name."""
    with np.load(file) as archive:
        return {name: archive[name] for name in archive.files}


class Worker:
    """Holds what was opened."""

    def __init__(self) -> None:
        self.openvino: Any = importlib.import_module("openvino")
        self.core = self.openvino.Core()
        self.requests: dict[str, Any] = {}
        self.names: dict[str, set[str]] = {}
        self.feeds: dict[str, Feeds] = {}

    def quantize(self, job: Job) -> Job:
        """int8 by NNCF, its transformer scheme: SmoothQuant, fast bias correction."""
        nncf: Any = importlib.import_module("nncf")
        model = self.core.read_model(job["quantize"])
        wanted = {name for value in model.inputs for name in value.names}
        batches = [
            {name: array for name, array in read(str(file)).items() if name in wanted}
            for file in sorted(Path(job["calibration"]).glob("*.npz"))
        ]
        start = time.perf_counter()
        made = nncf.quantize(
            model, nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches)
        )
        seconds = time.perf_counter() - start
        self.openvino.save_model(made, job["result"], compress_to_fp16=False)
        return {"seconds": seconds}

    def open(self, job: Job) -> Job:
        """Compile a file for the processor."""
        model = self.core.read_model(job["open"])
        settings: Job = {"INFERENCE_PRECISION_HINT": job["precision"]}
        if job["threads"]:
            settings["INFERENCE_NUM_THREADS"] = job["threads"]
        self.requests[job["as"]] = self.core.compile_model(model, "CPU", settings).create_infer_request()
        self.names[job["as"]] = {name for value in model.inputs for name in value.names}
        return {}

    def run(self, job: Job) -> Job:
        """One timed run."""
        if job["feeds"] not in self.feeds:
            self.feeds[job["feeds"]] = read(job["feeds"])
        name = job["run"]
        feeds = {key: array for key, array in self.feeds[job["feeds"]].items() if key in self.names[name]}
        start = time.perf_counter()
        found = self.requests[name].infer(feeds)
        milliseconds = (time.perf_counter() - start) * 1e3
        if "result" in job:
            np.save(job["result"], found[0])
        return {"milliseconds": milliseconds}

    def answer(self, job: Job) -> Job:
        """What a job gives."""
        for verb in ("quantize", "open", "run"):
            if verb in job:
                found: Job = getattr(self, verb)(job)
                return found
        raise ValueError(f"no such job: {sorted(job)}")


def main() -> int:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the tools print on standard output
    worker = Worker()
    for line in sys.stdin:
        try:
            found = worker.answer(json.loads(line))
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"}
        print(json.dumps(found), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
