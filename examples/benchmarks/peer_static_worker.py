# SPDX-License-Identifier: Apache-2.0
"""int8 by NNCF in an environment of its own: `peers.py` runs this file.

    python peer_static_worker.py job.json

The job names `model`, `result`, `calibration` (a folder of .npz files, one a batch) and `options`:
`transformer`, whether it is told that the model is one. It writes `result` and prints one line of JSON as
`peer_job.py` says. A model above opset 18 is converted, where that works: what NNCF makes of later
ones does not open in onnxruntime's default mode.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

import onnx
from onnx import version_converter

if TYPE_CHECKING:
    from splitfold.examples.benchmarks.peer_job import Clock, Job, answered, batches
else:
    from peer_job import Clock, Job, answered, batches

OPSET = 18


def prepared(file: str) -> onnx.ModelProto:
    """The model at opset 18, shapes inferred, every node with a name of its own."""
    model = onnx.load(file)
    try:
        model = version_converter.convert_version(model, OPSET)
    except Exception as error:
        print(f"left as it is: {error}", file=sys.stderr)
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
    return onnx.shape_inference.infer_shapes(model)


def work(job: Job) -> Clock:
    """Quantize with NNCF."""
    nncf: Any = importlib.import_module("nncf")
    model, data = prepared(job["model"]), batches(job["calibration"])
    kind = nncf.ModelType.TRANSFORMER if job["options"].get("transformer") else None
    clock = Clock()
    made = nncf.quantize(
        model,
        nncf.Dataset(data),
        subset_size=len(data),
        target_device=nncf.TargetDevice.CPU,
        model_type=kind,
    )
    clock.stop()
    onnx.save(made, job["result"])
    return clock


if __name__ == "__main__":
    raise SystemExit(answered(work))
