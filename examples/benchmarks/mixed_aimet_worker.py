# SPDX-License-Identifier: Apache-2.0
"""AIMET's Lite-MP in an environment of its own: `mixed_peers.py` runs this file.

    python mixed_aimet_worker.py job.json

The job names `model`, `result`, `calibration` (a folder of .npz files, one a batch) and `options`: `percent`
of the layers that Lite-MP gives a higher precision (0 is int8 alone), and which, `wide`: "int16" or
"float16", of which the exported file keeps float32. It writes `result` and prints one line of JSON as
`peer_job.py` says.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort

if TYPE_CHECKING:
    from splitfold.examples.benchmarks.peer_job import Clock, Job, answered, batches
else:
    from peer_job import Clock, Job, answered, batches

SAMPLES = 4
"""Batches on which its analysis of layers measures."""


def first_outputs(session: Any, data: Sequence[dict[str, Any]]) -> list[Any]:
    """The first output of the model for each batch."""
    return [session.run(None, batch)[0].astype(np.float64) for batch in data]


def quantized(job: Job) -> onnx.ModelProto:
    """Call it."""
    aimet: Any = importlib.import_module("aimet_onnx")
    analyzer: Any = importlib.import_module("aimet_onnx.quant_analyzer")
    lite: Any = importlib.import_module("aimet_onnx.lite_mp")
    data, percent = batches(job["calibration"]), job["options"]["percent"]
    sim = aimet.QuantizationSimModel(onnx.load(job["model"]), param_type="int8", activation_type="int8")
    sim.compute_encodings(data)
    if percent:
        some = data[:SAMPLES]
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
        sim.compute_encodings(data)
    made: onnx.ModelProto = sim.to_onnx_qdq()
    return made


def work(job: Job) -> Clock:
    """Quantize with AIMET."""
    clock = Clock()
    made = quantized(job)
    clock.stop()
    onnx.save(made, job["result"])
    return clock


if __name__ == "__main__":
    raise SystemExit(answered(work))
