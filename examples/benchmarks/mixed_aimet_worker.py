# SPDX-License-Identifier: Apache-2.0
"""AIMET's Lite-MP in an environment of its own: `mixed_peers.py` runs this file.

    python mixed_aimet_worker.py job.json

The job names `model`, `result`, `calibration` (a folder of .npz files, one a batch) and `options`: `percent`
of the layers that Lite-MP gives a higher precision (0 is int8 alone), and which, `wide`: "int16" or
"float16", of which the exported file keeps float32. It writes `result` and prints one line of JSON as
`weight_peer_worker.py` does.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

SAMPLES = 4
"""Batches on which its analysis of layers measures."""


def feeds(folder: str) -> list[dict[str, Any]]:
    """The batches of a folder."""
    found = []
    for file in sorted(Path(folder).glob("*.npz")):
        with np.load(file) as archive:
            found.append({name: archive[name] for name in archive.files})
    return found


def first_outputs(session: Any, batches: Sequence[dict[str, Any]]) -> list[Any]:
    """The first output of the model for each batch."""
    return [session.run(None, batch)[0].astype(np.float64) for batch in batches]


def quantized(job: dict[str, Any]) -> onnx.ModelProto:
    """Call it."""
    aimet: Any = importlib.import_module("aimet_onnx")
    analyzer: Any = importlib.import_module("aimet_onnx.quant_analyzer")
    lite: Any = importlib.import_module("aimet_onnx.lite_mp")
    batches, percent = feeds(job["calibration"]), job["options"]["percent"]
    sim = aimet.QuantizationSimModel(onnx.load(job["model"]), param_type="int8", activation_type="int8")
    sim.compute_encodings(batches)
    if percent:
        some = batches[:SAMPLES]
        plain = ort.InferenceSession(job["model"], providers=["CPUExecutionProvider"])
        expected = first_outputs(plain, some)

        def decibels(session: Any) -> float:
            pairs = list(zip(expected, first_outputs(session, some), strict=True))
            noise = sum(float(np.square(x - y).sum()) for x, y in pairs)
            return float(10 * np.log10(sum(float(np.square(x).sum()) for x, _ in pairs) / max(noise, 1e-30)))

        sensitivity = analyzer.analyze_per_layer_sensitivity(sim, decibels)
        wide = getattr(aimet, job["options"]["wide"])
        lite.flip_layers_to_higher_precision(
            sim, sensitivity, percent_to_flip=percent, override_precision=wide
        )
        sim.compute_encodings(batches)
    made: onnx.ModelProto = sim.to_onnx_qdq()
    return made


def main() -> int:
    """Do one job."""
    logging.disable(logging.WARNING)
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        wall, processor = time.perf_counter(), time.process_time()
        made = quantized(job)
        answer: dict[str, Any] = {
            "seconds": time.perf_counter() - wall,
            "processor": time.process_time() - processor,
        }
        onnx.save(made, job["result"])
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        answer = {"error": f"{type(error).__name__}: {lines[0]}"}
    print("\n" + json.dumps(answer))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
