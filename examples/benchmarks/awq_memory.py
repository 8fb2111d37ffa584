# SPDX-License-Identifier: Apache-2.0
"""Peak memory of AWQ's two searches (scales, then clip) on a stack of pre-norm blocks, each in a process of
its own.

Run `python -m splitfold.examples.benchmarks.awq_memory`; it needs about 1 GB of disk and 2 GB of memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from splitfold.examples.benchmarks.data import Feeds, Floats
from splitfold.examples.benchmarks.report import Report, arguments, say
from splitfold.passes.base import Context
from splitfold.passes.pipeline import Pipeline
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.model_file import read_model

BLOCKS, HIDDEN, INNER = 12, 768, 3072
ROWS, BATCHES = 64, 8
LIMIT = 1.5
SCALES = "canonicalize,fold-scales{method=awq,bits=4}"
PIPELINES = {
    "fold-scales": SCALES,
    "fold-scales and clip": f"{SCALES},quantize-weights{{method=awq}}",
}


def build(folder: Path) -> Path:
    """Write the stack: x + W2 gelu(W1 norm(x)), weights in a file beside the model."""
    rng = np.random.default_rng(0)
    nodes, initializers = [], []
    current = "x"
    for block in range(BLOCKS):
        prefix = f"blocks.{block}"
        arrays: dict[str, Floats] = {
            "gamma": rng.uniform(0.5, 2, HIDDEN).astype(np.float32),
            "beta": (rng.standard_normal(HIDDEN) / 10).astype(np.float32),
            "up": (rng.standard_normal((HIDDEN, INNER)) / HIDDEN**0.5).astype(np.float32),
            "down": (rng.standard_normal((INNER, HIDDEN)) / INNER**0.5).astype(np.float32),
        }
        initializers += [onnx.numpy_helper.from_array(array, f"{prefix}.{n}") for n, array in arrays.items()]
        chain = [
            ("LayerNormalization", [current, f"{prefix}.gamma", f"{prefix}.beta"], "normed"),
            ("MatMul", [f"{prefix}.normed", f"{prefix}.up"], "wide"),
            ("Gelu", [f"{prefix}.wide"], "bent"),
            ("MatMul", [f"{prefix}.bent", f"{prefix}.down"], "narrow"),
            ("Add", [current, f"{prefix}.narrow"], "sum"),
        ]
        nodes += [helper.make_node(op, i, [f"{prefix}.{o}"], f"{prefix}.{o}") for op, i, o in chain]
        current = f"{prefix}.sum"
    nodes.append(helper.make_node("Identity", [current], ["y"], "last"))
    shape: list[str | int | None] = ["batch", HIDDEN]
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name in ("x", "y")]
    graph = helper.make_graph(nodes, "stack", ends[0], ends[1], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = folder / "stack.onnx"
    onnx.save(model, path, save_as_external_data=True, location="stack.data")
    return path


def calibration() -> list[Feeds]:
    """Seeded batches with a few loud channels."""
    rng = np.random.default_rng(1)
    loudness = np.exp(rng.standard_normal(HIDDEN)).astype(np.float32)
    return [{"x": rng.standard_normal((ROWS, HIDDEN), np.float32) * loudness} for _ in range(BATCHES)]


def peak() -> int:
    """Bytes that this process has held resident at most, file-backed pages included (Linux).

    `getrusage` would report the parent's peak too, which a child takes over.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def run_alone(model: Path, text: str) -> None:
    """Run the passes in this process and print its memory before, at most, and the seconds, as JSON."""
    batches = Calibration.of(calibration())
    before, start = peak(), time.perf_counter()
    Pipeline.parse(text).run(read_model(model), Context(calibration=batches))
    print(json.dumps({"before": before, "peak": peak(), "seconds": time.perf_counter() - start}))


def main() -> int:
    """Build, run the passes in children, print the table."""
    options = arguments(
        __doc__,
        (
            "--child",
            {"nargs": 2, "metavar": ("MODEL", "PIPELINE"), "help": "run in this process"},
        ),
    )
    if options.child:
        run_alone(Path(options.child[0]), options.child[1])
        return 0
    with tempfile.TemporaryDirectory() as name:
        model = build(Path(name))
        size = sum(file.stat().st_size for file in Path(name).iterdir())
        one_block = 4 * ROWS * BATCHES * (3 * HIDDEN + 2 * INNER)
        say(f"built {size / 1e6:.0f} MB; activations of a block on all batches {one_block / 1e6:.0f} MB")
        report = Report(
            f"AWQ on {size / 1e6:.0f} MB, {BLOCKS} blocks of {HIDDEN} x {INNER}, {BATCHES * ROWS} rows"
        )
        for what, text in PIPELINES.items():
            command = [sys.executable, str(Path(__file__).resolve()), "--child", str(model), text]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found = json.loads(output.splitlines()[-1])
            share = (found["peak"] - found["before"] - one_block) / size
            report.check(
                f"{what}: peak less libraries and a block, x the model", share, LIMIT, most=True, form=".2f"
            )
            report.note("  peak, libraries, MB", f"{found['peak'] / 1e6:.0f}, {found['before'] / 1e6:.0f}")
            report.note("  seconds", f"{found['seconds']:.0f}")
    return int(report.finish() > 0)


if __name__ == "__main__":
    raise SystemExit(main())
