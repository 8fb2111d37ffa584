# SPDX-License-Identifier: Apache-2.0
"""A model above 2 GB, compiled to 4 bits in a process of its own, whose peak memory is printed.

Run `python examples/benchmarks/large_model.py`; it needs about 6 GB of disk and as much memory.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from splitfold.compiler import compile, presets
from splitfold.examples.benchmarks.report import Report, arguments, kernels, megabytes, say

LAYERS = 34
WIDTH = 4096
LIMIT = 2.5
GAIN = 0.3
"""Below 1, so that a deep random stack is not chaotic and 4 bits stay near the float model."""


def build(folder: Path, layers: int, width: int) -> Path:
    """Write a residual stack of MatMul, bias and Tanh; no more than one weight is held at a time."""
    rng = np.random.default_rng(0)
    nodes, initializers, at = [], [], 0
    current = "x"
    with (folder / "weights.bin").open("wb") as file:
        for layer in range(layers):
            weight = rng.standard_normal((width, width), np.float32)
            weight *= np.float32(GAIN / np.sqrt(width))
            tensor = TensorProto(
                name=f"layers.{layer}.weight", data_type=TensorProto.FLOAT, dims=weight.shape
            )
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "weights.bin"), ("offset", at), ("length", weight.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            weight.tofile(file)
            at += weight.nbytes
            initializers.append(tensor)
            bias = rng.standard_normal(width).astype(np.float32) / 10
            initializers.append(onnx.numpy_helper.from_array(bias, f"layers.{layer}.bias"))
            product, biased, bent, summed = (
                f"layers.{layer}.{part}" for part in ("product", "biased", "bent", "sum")
            )
            nodes += [
                helper.make_node("MatMul", [current, tensor.name], [product], f"layers.{layer}"),
                helper.make_node("Add", [product, f"layers.{layer}.bias"], [biased], f"layers.{layer}.add"),
                helper.make_node("Tanh", [biased], [bent], f"layers.{layer}.tanh"),
                helper.make_node("Add", [current, bent], [summed], f"layers.{layer}.residual"),
            ]
            current = summed
    nodes.append(helper.make_node("Identity", [current], ["y"], "last"))
    shape: list[str | int | None] = ["batch", width]
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = folder / "large.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def compile_alone(model: Path, result: Path) -> None:
    """Compile and save in this process, and print its peak memory and times as JSON."""
    start = time.perf_counter()
    artifact = compile(model, pipeline=presets.int4())
    compiled = time.perf_counter()
    artifact.save(result)
    low = sum(found["low_bit"] for found in artifact.manifest["realised"].values())
    deviation = next(iter(artifact.manifest["deviation"].values()))
    print(
        json.dumps(
            {
                "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "compile": compiled - start,
                "save": time.perf_counter() - compiled,
                "layers": low,
                "cosine": deviation["cosine"],
            }
        )
    )


class Anonymous(threading.Thread):
    """Watches a process's memory that is not a view of a file."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self._status = Path(f"/proc/{process}/status")
        self.peak = 0

    def run(self) -> None:
        """Look ten times a second until the process ends."""
        while True:
            try:
                lines = self._status.read_text(encoding="utf-8").splitlines()
            except OSError:
                return
            self.peak = max(
                [self.peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))]
            )
            time.sleep(0.1)


def main() -> int:
    """Build, compile in a child, print the table."""
    options = arguments(
        __doc__,
        ("--layers", {"type": int, "default": LAYERS, "help": "number of layers"}),
        ("--child", {"nargs": 2, "metavar": ("MODEL", "RESULT"), "help": "compile only, in this process"}),
    )
    if options.child:
        compile_alone(Path(options.child[0]), Path(options.child[1]))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build(folder, options.layers, WIDTH)
        size = model.stat().st_size + (folder / "weights.bin").stat().st_size
        say(f"built {size / 1e9:.2f} GB")
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--child",
            str(model),
            str(folder / "result"),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            watcher = Anonymous(child.pid)
            watcher.start()
            output, _ = child.communicate()
        report = Report(f"{size / 1e9:.2f} GB model, {options.layers} layers of {WIDTH} x {WIDTH}, to int4")
        if child.returncode:
            report.verdict("compile and save", f"exit code {child.returncode}", "0", False)
            return report.finish()
        found = json.loads(output.splitlines()[-1])
        report.check(
            "peak resident memory, multiples of the model", found["peak"] / size, LIMIT, most=True, form=".2f"
        )
        report.note(
            "  in GB; of it not file-backed at most",
            f"{found['peak'] / 1e9:.2f}; {watcher.peak / 1e9:.2f} ({watcher.peak / size:.2f}x)",
        )
        report.note("seconds to compile, to save", f"{found['compile']:.0f}, {found['save']:.0f}")
        low = found["layers"] == options.layers
        report.verdict("layers in a low-bit kernel", f"{found['layers']}", f">= {options.layers}", low)
        written = folder / "result" / "model.onnx"
        report.note(
            "cosine of the output; file, MB; kernels",
            f"{found['cosine']:.5f}; {megabytes(written):.1f}; {kernels(written)}",
        )
    return int(report.finish() > 0)


if __name__ == "__main__":
    raise SystemExit(main())
