# SPDX-License-Identifier: Apache-2.0
"""A random Llama with a cache: one token after a past, and a prompt, beside onnxruntime's own quantizer.

    python -m splitfold.examples.benchmarks.decoding [--size 100m] [--past 128] [--prompt 128] [--rounds 15]

All models take turns on the same inputs; ratios are taken turn by turn, their median stands in the table.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from splitfold.compiler import Pipeline, Tolerance, compile, presets
from splitfold.compiler.decoder import capture_decoder
from splitfold.examples.benchmarks.report import (
    Report,
    arguments,
    kernels,
    megabytes,
    open_bare,
    say,
    sqnr,
)
from splitfold.runtime.cache import CacheShape
from splitfold.runtime.feeds import Array
from splitfold.runtime.model_file import read_model, write_model
from splitfold.runtime.race import Race, race_of

__all__ = ["SIZES", "Size", "ours"]

FASTER = 3.0
DEFAULT = "onnxruntime MatMulNBitsQuantizer, its defaults"
INT4, PRESET = "ours, int4", "ours, preset decoder"
FUSED = Pipeline.parse("fuse-cached-attention")
WORDS = 32000
RUNS = 5
"""Tokens in a turn."""


@dataclass(frozen=True)
class Size:
    """Widths of a Llama."""

    width: int
    inner: int
    layers: int
    heads: int
    key_heads: int

    def build(self) -> Any:
        """Return it with random weights, in eval mode."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=WORDS,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            max_position_embeddings=4096,
        )
        module: Any = LlamaForCausalLM(config)
        return module.eval()


SIZES = {
    "tiny": Size(64, 128, 2, 4, 2),
    "100m": Size(768, 2048, 12, 12, 4),
    "1b": Size(2048, 8192, 16, 32, 8),
}


def ours() -> dict[str, Pipeline]:
    """Return the pipelines that are compared, by what they are called."""
    blocks = "quantize-weights{{bits=4,block={block}{more}}},quantize-embeddings"
    exact = Pipeline(presets.exact().steps[:-1])
    found = {
        "ours, float": exact,
        INT4: exact + Pipeline.parse(blocks.format(block=32, more="")),
        "ours, int4, blocks of 128": exact + Pipeline.parse(blocks.format(block=128, more="")),
        "ours, int4, symmetric blocks of 128": exact
        + Pipeline.parse(blocks.format(block=128, more=",symmetric=true")),
        "ours, dynamic int8": exact + Pipeline.parse("quantize-dynamic,quantize-embeddings"),
    }
    return {name: steps + FUSED for name, steps in found.items()} | {PRESET: presets.decoder()}


def onnxruntime_blocks(model: Path, result: Path, level: int | None = None) -> Path:
    """`MatMulNBitsQuantizer` as it comes, or with an accuracy level."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger().setLevel(logging.WARNING)  # its import turns every library's messages on
    logging.disable(logging.WARNING)
    try:
        quantizer = MatMulNBitsQuantizer(onnx.load(model), accuracy_level=level)
        quantizer.process()
        onnx.save(quantizer.model.model, result, save_as_external_data=True, location=f"{result.name}.data")
    finally:
        logging.disable(logging.NOTSET)
    return result


def written(model: ir.Model, folder: Path) -> dict[str, Path]:
    """The files of all models."""
    files = {"float, as captured": write_model(model, folder, "captured.onnx")[0]}
    captured = files["float, as captured"]
    files = {DEFAULT: onnxruntime_blocks(captured, folder / "default.onnx")} | files
    files["onnxruntime MatMulNBitsQuantizer, level 4"] = onnxruntime_blocks(
        captured, folder / "level4.onnx", 4
    )
    for at, (name, steps) in enumerate(ours().items()):
        say(f"{name}: {steps}")
        artifact = compile(captured, pipeline=steps, speed=None, tolerance=Tolerance(cosine=None))
        files[name] = artifact.save_model(folder / f"ours{at}.onnx")
    return files


def feeds(cache: CacheShape, past: int, new: int) -> dict[str, Array]:
    """Random tokens after a random past."""
    rng = np.random.default_rng(0)
    held = {
        name: rng.standard_normal((1, heads, past, size)).astype(np.float32)
        for name, (heads, size) in zip(cache.layout.past, cache.sizes, strict=True)
    }
    ids = rng.integers(3, WORDS, (1, new))
    return {"input_ids": ids, "attention_mask": np.ones((1, past + new), np.int64)} | held


def timed(sessions: Mapping[str, Any], given: dict[str, Array], rounds: int, runs: int) -> dict[str, Race]:
    """The first session against each; in each round each takes a turn of `runs` runs, after one that is not
    timed where there are several: a second token finds weights and threads where the first left them."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(-1, rounds):
        for name, session in sessions.items():
            if runs > 1:
                session.run(None, given)
            found = [_milliseconds(session, given) for _ in range(runs)]
            if turn >= 0:
                times[name].append(statistics.median(found))
    first = times[next(iter(times))]
    return {name: race_of(first, found) for name, found in times.items()}


def _milliseconds(session: Any, given: dict[str, Array]) -> float:
    begin = time.perf_counter()
    session.run(None, given)
    return (time.perf_counter() - begin) * 1e3


def file_bytes(path: Path) -> float:
    """Megabytes of a model with its weights."""
    data = path.with_name(f"{path.name}.data")
    return megabytes(path) + (megabytes(data) if data.is_file() else 0.0)


def main() -> int:
    """Print the table."""
    options = arguments(
        __doc__,
        ("--size", {"choices": list(SIZES), "default": "100m"}),
        ("--past", {"type": int, "default": 128}),
        ("--prompt", {"type": int, "default": 128}),
        ("--rounds", {"type": int, "default": 15}),
    )
    report = Report(
        f"Llama of {options.size}: one token after {options.past}, and a prompt of {options.prompt}"
    )
    with tempfile.TemporaryDirectory() as name:
        say("captured with its cache")
        files = written(capture_decoder(SIZES[options.size].build()), Path(name))
        cache = CacheShape.of(read_model(files[DEFAULT]))
        sessions = {name: open_bare(path) for name, path in files.items()}
        step, prompt = feeds(cache, options.past, 1), feeds(cache, 0, options.prompt)
        decode = timed(sessions, step, options.rounds, RUNS)
        prefill = timed(sessions, prompt, options.rounds, 1)
        reference = sessions["float, as captured"].run(["logits"], prompt)
        for name, session in sessions.items():
            noise = sqnr(reference, session.run(["logits"], prompt))
            report.note(
                name, f"{file_bytes(files[name]):.1f} MB, {kernels(files[name])}; logits {noise:.1f} dB"
            )
            report.note("  one token", _told(decode[name], 1))
            report.note("  prompt", _told(prefill[name], options.prompt))
        report.check(f"{PRESET}: one token, over {DEFAULT}", decode[PRESET].ratio, FASTER, form=".2f")
        report.check(f"{PRESET}: prompt, over {DEFAULT}", prefill[PRESET].ratio, 1.0, form=".2f")
    return int(report.finish() > 0)


def _told(found: Race, tokens: int) -> str:
    rate, spread = tokens / found.after_ms * 1e3, f"{found.low:.2f} to {found.high:.2f}"
    return f"{found.after_ms:.2f} ms, {rate:.1f} tokens/s, {found.ratio:.2f}x ({spread})"


if __name__ == "__main__":
    raise SystemExit(main())
