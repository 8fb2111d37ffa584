# SPDX-License-Identifier: Apache-2.0
"""Latency of one attention block in ONNX Runtime: vanilla, clipped and gated, written out and fused.

    python -m splitfold.examples.benchmarks.attention_latency [--rounds 51]

All forms of a shape run in turn in each round, so that other load hits them alike; a row is the median of the
ratios of the rounds to the first form, and the quartiles. Clipped softmax is measured as PyTorch exports it,
Mul, Add and Clip, and after the pass fold-clips.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper, parser

from splitfold.examples.benchmarks.data import Feeds
from splitfold.examples.benchmarks.report import Report, arguments, interleaved, open_bare, say
from splitfold.passes.pipeline import Pipeline

ALPHA = 3.0
ROUNDS = 51


@dataclass(frozen=True)
class Shape:
    """Sizes of a block."""

    batch: int
    length: int
    heads: int
    size: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.length}, {self.heads} heads of {self.size}"

    @property
    def width(self) -> int:
        """Channels."""
        return self.heads * self.size

    @property
    def chain(self) -> str:
        """Clipped softmax as PyTorch exports it."""
        return "t = Mul(w, slope) u = Add(t, gamma) p = Clip(u, zero, one)"


SHAPES = (Shape(1, 128, 12, 64), Shape(1, 128, 4, 64), Shape(8, 128, 4, 64), Shape(1, 512, 12, 64))
WRITTEN_OUT = """
h = Reshape(q, apart) i = Reshape(k, apart) j = Reshape(v, apart)
qh = Transpose<perm = [0, 2, 1, 3]>(h) kh = Transpose<perm = [0, 2, 3, 1]>(i)
vh = Transpose<perm = [0, 2, 1, 3]>(j)
r = MatMul(qh, kh) s = Mul(r, scale) {softmax}
c = MatMul(p, vh) d = Transpose<perm = [0, 2, 1, 3]>(c) m = Reshape(d, joined)"""
FUSED = "m = com.microsoft.MultiHeadAttention<num_heads = {heads}>(q, k, v)"
PLAIN = "p = Softmax<axis = -1>(s)"
CLIPPED = "w = Softmax<axis = -1>(s) {chain}"
SOFTMAX_ALONE = """<ir_version: 10, opset_import: ["" : 20]>
alone (float[{batch},{heads},{length},{length}] s) => (float[{batch},{heads},{length},{length}] p)
<float slope, float gamma, float zero, float one> {{ {softmax} }}"""
BLOCK = """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
block (float[{batch},{length},{width}] x) => (float[{batch},{length},{width}] y)
<float[{width},{width}] wq, float[{width},{width}] wk, float[{width},{width}] wv, float[{width},{width}] wo,
float scale, float slope, float gamma, float zero, float one, int64[4] apart, int64[3] joined>
{{ q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) {attention} y = MatMul(m, wo) }}"""


def model_of(shape: Shape, text: str) -> ir.Model:
    """The model of a text, with seeded weights."""
    proto = parser.parse_model(text)
    width, rng = shape.width, np.random.default_rng(0)
    gamma = -ALPHA / shape.length
    numbers = {"scale": shape.size**-0.5, "slope": 1 - gamma, "gamma": gamma, "zero": 0.0, "one": 1.0}
    held = {name: np.array(number, np.float32) for name, number in numbers.items()}
    held |= {
        "apart": np.array([0, 0, shape.heads, shape.size], np.int64),
        "joined": np.array([0, 0, width], np.int64),
    }
    for name in ("wq", "wk", "wv", "wo"):
        held[name] = (rng.standard_normal((width, width)) / width**0.5).astype(np.float32)
    names = {name for node in proto.graph.node for name in node.input} & set(held)
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(numpy_helper.from_array(held[name], name) for name in sorted(names))
    if any(node.domain for node in proto.graph.node):  # whose outputs no inference knows
        sizes = [shape.batch, shape.length, width]
        proto.graph.value_info.append(helper.make_tensor_value_info("m", onnx.TensorProto.FLOAT, sizes))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def saved(model: ir.Model, pipeline: str, file: Path) -> Path:
    """Write a model after passes, which must change it."""
    records = Pipeline.parse(pipeline).run(model) if pipeline else []
    if records and not records[-1].modified:
        raise SystemExit(f"{pipeline} changed nothing: {records[-1].skipped or records[-1].missed}")
    ir.save(model, file)
    return file


def softmaxes(shape: Shape, folder: Path) -> Mapping[str, Path]:
    """Files of a softmax alone."""
    sizes = {"batch": shape.batch, "heads": shape.heads, "length": shape.length}
    clipped = CLIPPED.format(chain=shape.chain)
    plain, chain = (SOFTMAX_ALONE.format(**sizes, softmax=text) for text in (PLAIN, clipped))
    return {
        "softmax alone": saved(model_of(shape, plain), "", folder / "softmax.onnx"),
        "and clipped: Mul, Add, Clip": saved(model_of(shape, chain), "", folder / "chain.onnx"),
        "and clipped: HardSigmoid": saved(
            model_of(shape, chain), "canonicalize,fold-clips", folder / "folded.onnx"
        ),
    }


def blocks(shape: Shape, folder: Path) -> Mapping[str, Path]:
    """Files of a whole block."""

    def text(attention: str) -> str:
        sizes = {"batch": shape.batch, "length": shape.length, "width": shape.width}
        return BLOCK.format(**sizes, attention=attention)

    plain = text(WRITTEN_OUT.format(softmax=PLAIN))
    chain = text(WRITTEN_OUT.format(softmax=CLIPPED.format(chain=shape.chain)))
    fused = text(FUSED.format(heads=shape.heads))
    gated = {kind: f"canonicalize,gate-attention{{kind={kind}}}" for kind in ("all-heads", "linear")}
    forms = {
        "written out": (plain, ""),
        "written out, clipped: Mul, Add, Clip": (chain, ""),
        "written out, clipped: HardSigmoid": (chain, "canonicalize,fold-clips"),
        "written out, gated, all heads": (plain, gated["all-heads"]),
        "written out, gated, linear": (plain, gated["linear"]),
        "fused": (fused, ""),
        "fused, gated, all heads": (fused, gated["all-heads"]),
        "fused, gated, linear": (fused, gated["linear"]),
    }
    return {
        name: saved(model_of(shape, source), pipeline, folder / f"{at}.onnx")
        for at, (name, (source, pipeline)) in enumerate(forms.items())
    }


def rows(title: str, files: Mapping[str, Path], feeds: Feeds, rounds: int, report: Report) -> None:
    """The time of each file over that of the first."""
    sessions = {name: open_bare(file) for name, file in files.items()}
    runs = {name: functools.partial(session.run, None, feeds) for name, session in sessions.items()}
    found = interleaved(runs, rounds)
    for name, timing in found.items():
        times = f"{1 / timing.ratio:.2f} times the first ({1 / timing.high:.2f} to {1 / timing.low:.2f})"
        report.note(f"{title}: {name}", f"{1e6 * timing.seconds:.0f} us, {times}")
    say(title)


def main() -> int:
    """Print the table."""
    options = arguments(
        __doc__,
        ("--rounds", {"type": int, "default": ROUNDS, "help": "rounds, each of which runs every form once"}),
        ("--quick", {"action": "store_true", "help": "the first shape only, few rounds"}),
    )
    report = Report("Attention in ONNX Runtime: median time of a form over the first of its shape")
    rounds = min(options.rounds, 7) if options.quick else options.rounds
    for shape in SHAPES[:1] if options.quick else SHAPES:
        rng = np.random.default_rng(1)
        scores = (shape.batch, shape.heads, shape.length, shape.length)
        s = rng.standard_normal(scores).astype(np.float32)
        x = rng.standard_normal((shape.batch, shape.length, shape.width)).astype(np.float32)
        with tempfile.TemporaryDirectory() as folder:
            rows(str(shape), softmaxes(shape, Path(folder)), {"s": s}, rounds, report)
            rows(str(shape), blocks(shape, Path(folder)), {"x": x}, rounds, report)
    return int(report.finish() > 0)


if __name__ == "__main__":
    raise SystemExit(main())
