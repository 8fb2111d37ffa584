# SPDX-License-Identifier: Apache-2.0
"""int8 by NNCF in an environment of its own: `peers.py` runs this file.

    python peer_static_worker.py job.json

The job names `model`, `result`, `calibration` (a folder of .npz files, one a batch) and `options`:
`transformer`, whether it is told that the model is one. It writes `result` and prints one line of JSON as
`weight_peer_worker.py` does. A model above opset 18 is converted, where that works: what NNCF makes of later
ones does not open in onnxruntime's default mode.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import version_converter

OPSET = 18


def feeds(folder: str) -> list[dict[str, Any]]:
    """The batches of a folder."""
    found = []
    for file in sorted(Path(folder).glob("*.npz")):
        with np.load(file) as archive:
            found.append({name: archive[name] for name in archive.files})
    return found


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


def main() -> int:
    """Do one job."""
    logging.disable(logging.WARNING)
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        nncf: Any = importlib.import_module("nncf")
        model, batches = prepared(job["model"]), feeds(job["calibration"])
        kind = nncf.ModelType.TRANSFORMER if job["options"].get("transformer") else None
        wall, processor = time.perf_counter(), time.process_time()
        made = nncf.quantize(
            model,
            nncf.Dataset(batches),
            subset_size=len(batches),
            target_device=nncf.TargetDevice.CPU,
            model_type=kind,
        )
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
