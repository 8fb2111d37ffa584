# SPDX-License-Identifier: Apache-2.0
"""Random Llamas with a cache in several sizes, and what each tool makes of one."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from splitfold.compiler import Artifact, Pipeline, Tolerance, compile, presets
from splitfold.examples.benchmarks.report import megabytes, say
from splitfold.runtime.bundle import DECODE, PREFILL, Bundle

__all__ = [
    "BUNDLE",
    "DEFAULT",
    "FLOAT",
    "LARGE",
    "LEVEL",
    "PRESET",
    "SIZES",
    "WORDS",
    "Files",
    "Size",
    "made",
]

WORDS = 32000
FLOAT = "float, as captured"
DEFAULT = "onnxruntime MatMulNBitsQuantizer, its defaults"
LEVEL = "onnxruntime MatMulNBitsQuantizer, level 4"
PRESET, BUNDLE = "ours, preset decoder", "ours, two graphs of the same weights"
LARGE = (DEFAULT, LEVEL, PRESET, BUNDLE)
"""Of a model so large that not all fit into memory beside each other."""
FUSED = Pipeline.parse("fuse-cached-attention")
WIDER = "widen-blocks"
SHOWN = 3


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

    @property
    def head(self) -> int:
        """Elements of a head."""
        return self.width // self.heads


SIZES = {
    "tiny": Size(64, 128, 2, 4, 2),
    "100m": Size(768, 2048, 12, 12, 4),
    "1b": Size(2048, 8192, 16, 32, 8),
}


@dataclass(frozen=True)
class Files:
    """A model as one tool writes it: the graphs for one token and for a prompt, which may be the same.

    Attributes:
        step, prompt: ``.onnx`` files.
        weights: files beside them that hold weights.
    """

    step: Path
    prompt: Path
    weights: tuple[Path, ...] = ()

    @staticmethod
    def of(path: Path) -> Files:
        """One graph for both."""
        data = path.with_name(f"{path.name}.data")
        return Files(path, path, (data,) if data.is_file() else ())

    @property
    def megabytes(self) -> float:
        """Of all files."""
        return sum(megabytes(file) for file in {self.step, self.prompt, *self.weights})


def made(captured: Path, folder: Path, *, large: bool) -> Iterator[tuple[str, Files]]:
    """Yield the models of all tools by what they are called, onnxruntime's default first; of a large one
    those in LARGE. Files of onnxruntime and of the two graphs that `folder` holds already are used again."""
    yield DEFAULT, Files.of(_onnxruntime(captured, folder / "default.onnx"))
    if not large:
        yield FLOAT, Files.of(captured)
    yield LEVEL, Files.of(_onnxruntime(captured, folder / "level4.onnx", 4))
    for at, (name, steps) in enumerate({} if large else _pipelines().items()):
        file = _compiled(name, captured, steps).save_model(folder / f"ours{at}.onnx")
        yield name, Files.of(file)
    place = folder / "bundle"
    if not place.is_dir():
        decode = _compiled(PRESET, captured, presets.decoder())
        decode.save_model(folder / "decoder.onnx")
        prefill = _compiled(BUNDLE, decode.model, WIDER)
        Bundle({DECODE: decode, PREFILL: prefill}).save(place)
    yield PRESET, Files.of(folder / "decoder.onnx")
    weights = tuple(place.glob("*.data"))
    yield BUNDLE, Files(place / f"{DECODE}.onnx", place / f"{PREFILL}.onnx", weights)


def _pipelines() -> Mapping[str, Pipeline]:
    """Our pipelines beside the preset, by what they are called."""
    blocks = "quantize-weights{{bits=4,block={block}{more}}},quantize-embeddings"
    exact = Pipeline(presets.exact().steps[:-1])
    found = {
        "ours, float": exact,
        "ours, int4": exact + Pipeline.parse(blocks.format(block=32, more="")),
        "ours, int4, blocks of 128": exact + Pipeline.parse(blocks.format(block=128, more="")),
        "ours, int4, symmetric blocks of 128": exact
        + Pipeline.parse(blocks.format(block=128, more=",symmetric=true")),
        "ours, dynamic int8": exact + Pipeline.parse("quantize-dynamic,quantize-embeddings"),
    }
    return {name: steps + FUSED for name, steps in found.items()}


def _compiled(name: str, model: object, steps: Pipeline | str) -> Artifact:
    start = time.perf_counter()
    artifact = compile(model, pipeline=steps, speed=None, tolerance=Tolerance(cosine=None), reproducers=None)
    took = sorted(
        ((record.seconds, record.text.partition("{")[0]) for record in artifact.records), reverse=True
    )
    parts = ", ".join(f"{what} {seconds:.1f} s" for seconds, what in took[:SHOWN])
    say(f"{name}: {time.perf_counter() - start:.1f} s to compile, of which {parts}")
    return artifact


def _onnxruntime(model: Path, result: Path, level: int | None = None) -> Path:
    """`MatMulNBitsQuantizer` as it comes, or with an accuracy level."""
    if result.is_file():
        return result
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
