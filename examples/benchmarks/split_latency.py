# SPDX-License-Identifier: Apache-2.0
"""Time of a linear layer in its split forms, beside the plain layer, at one row and at 128."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from splitfold.compiler import Tolerance, compile
from splitfold.examples.benchmarks.data import Feeds
from splitfold.examples.benchmarks.report import Timing, interleaved, open_bare, say
from splitfold.examples.benchmarks.split_pipelines import apart, plain
from splitfold.examples.benchmarks.split_tables import Table

__all__ = ["latency_table"]

SHAPE = (384, 1536)
ROWS = (1, 128)
LOUD = 12
"""Input channels that are 20 times as large as the others."""
FLOAT = {
    "fp32, one layer": "canonicalize",
    "fp32, split in branches": "split-layers",
    "fp32, split, one weight": "split-layers{form=weight}",
    "fp32, outliers apart": "split-outliers{bits=2,block=64,share=0.1}",
}
LOW_BIT = {
    "2 bits, one layer": plain(2, 64),
    "2 bits, split in branches": f"split-layers,{plain(2, 64)}",
    "2 bits, split, one weight of codes": "split-layers{form=weight},"
    "quantize-parts{bits=2,block=64,form=codes}",
    "2 bits, outliers apart": apart(2, 64, 0.1),
    "4 bits, one layer": plain(4, 64),
}


def latency_table(folder: Path, rounds: int) -> Table:
    """Medians of interleaved runs, and the speed over the unsplit layer of the first row of each group."""
    rng = np.random.default_rng(0)
    model = _layer(rng)
    files: dict[str, Path] = {}
    for name, text in {**FLOAT, **LOW_BIT}.items():
        artifact = compile(
            model,
            calibration=[_feeds(128, rng) for _ in range(4)],
            pipeline=text,
            tolerance=Tolerance(cosine=None),
            reproducers=None,
        )
        files[name] = artifact.save_model(folder / f"layer{len(files)}.onnx")
        say(f"{name}: {text}")
    title = f"One linear layer [{SHAPE[0]}, {SHAPE[1]}]: median ms (times the unsplit layer's)"
    table = Table(title, ("form", *(f"{count} rows" for count in ROWS)))
    sessions = {name: open_bare(file) for name, file in files.items()}
    for group in (FLOAT, LOW_BIT):
        columns = []
        for count in ROWS:
            feeds = _feeds(count, rng)
            runs = {name: lambda s=sessions[name], f=feeds: s.run(None, f) for name in group}
            columns.append(interleaved(runs, rounds))
        for name in group:
            table.add(name, *(_cell(found[name]) for found in columns))
    table.show()
    return table


def _cell(timing: Timing) -> str:
    slow = (1 / timing.ratio, 1 / timing.high, 1 / timing.low)
    return f"{timing.seconds * 1e3:.3f} ({slow[0]:.2f}x, quartiles {slow[1]:.2f} to {slow[2]:.2f})"


def _layer(rng: np.random.Generator) -> ir.Model:
    weight = (rng.standard_normal(SHAPE) / np.sqrt(SHAPE[0])).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="dense")],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", SHAPE[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", SHAPE[1]])],
        [numpy_helper.from_array(weight, "w")],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def _feeds(count: int, rng: np.random.Generator) -> Feeds:
    sizes = np.ones(SHAPE[0])
    sizes[:LOUD] = 20
    return {"x": (rng.standard_normal((count, SHAPE[0])) * sizes).astype(np.float32)}
