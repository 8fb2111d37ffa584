# SPDX-License-Identifier: Apache-2.0
"""AMD Quark's mixed precision, in an environment of its own: `precision_peers.py` runs this file.

    python precision_quark_worker.py job.json

The job names `model`, `result`, `calibration` (a folder of .npz files, one a batch) and `options`: the
`threshold` of its search in dB, or none for int8 alone. It writes `result` and prints one line of JSON as
`peer_job.py` says. The base is uint8 activations and int8 weights a channel; the search gives
activations 16 bits, layer by layer, until the signal to noise ratio reaches the threshold.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from splitfold.examples.benchmarks.peer_job import Clock, Job, answered
else:
    from peer_job import Clock, Job, answered

SAMPLES = 4
"""Batches on which its search measures."""


class Reader:
    """Hands out the feeds of a folder, as Quark asks for them."""

    def __init__(self, folder: str) -> None:
        self.files = sorted(Path(folder).glob("*.npz"))
        self.rewind()

    def rewind(self) -> None:
        """Start again."""
        self.left = iter(self.files)

    def get_next(self) -> dict[str, Any] | None:
        """The next feeds, or None."""
        file = next(self.left, None)
        if file is None:
            return None
        with np.load(file) as archive:
            return {name: archive[name] for name in archive.files}

    def __len__(self) -> int:
        return len(self.files)


def quantized(job: Job) -> None:
    """Call it."""
    quark: Any = importlib.import_module("quark.onnx")
    minmax = quark.CalibMethod.MinMax
    activation = quark.UInt8Spec(symmetric=False, calibration_method=minmax)
    channel = quark.QuantGranularity.Channel
    weight = quark.Int8Spec(symmetric=True, quant_granularity=channel, calibration_method=minmax)
    algorithms = []
    if (threshold := job["options"].get("threshold")) is not None:
        wide = quark.Int16Spec(symmetric=True, calibration_method=minmax)
        algorithms.append(
            quark.AutoMixprecisionConfig(
                target_layer_config=quark.QLayerConfig(activation=wide),
                data_size=SAMPLES,
                metric_default="sqnr",
                metric_threshold=-threshold,
                metric_optimize_object="quality",
                sensitivity_cache_file=f"{job['result']}.sensitivity.json",
            )
        )
    config = quark.QConfig(
        global_config=quark.QLayerConfig(activation=activation, weight=weight),
        algo_config=algorithms,
        extra_options={"ForceQuantizeNoInputCheck": True},
    )
    quark.ModelQuantizer(config).quantize_model(job["model"], job["result"], Reader(job["calibration"]))


def work(job: Job) -> Clock:
    """Quantize with Quark, which writes the result itself."""
    Path(f"{job['result']}.sensitivity.json").unlink(missing_ok=True)
    clock = Clock()
    quantized(job)
    return clock.stop()


if __name__ == "__main__":
    raise SystemExit(answered(work))
