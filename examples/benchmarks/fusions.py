# SPDX-License-Identifier: Apache-2.0
"""What each fusion gains or costs on this machine: the same function written in several ways.

    python -m splitfold.examples.benchmarks.fusions [--rounds 41] [--only attention]

Each way is a model of its own in bare onnxruntime, with its graph optimizations off, so that what is written
is what runs; all take turns. Widths are those of MiniLM (384, 12 heads of 32, feed-forward 1536) at 1 x 32,
1 x 128 and 8 x 128 tokens, attention also at 512 and 1024. Ratios are against the first way of each block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from splitfold.examples.benchmarks.report import Report, arguments, interleaved
from splitfold.runtime.costs.builder import MICROSOFT, Builder, Built

WIDTH, WIDE, HEADS, SIZE = 384, 1536, 12, 32
TOKENS = ((1, 32), (1, 128), (8, 128))
LONG = ((1, 512), (4, 512), (1, 1024))
SCALE, ZERO = np.array(np.float32(0.05)), np.array(np.uint8(128))
TO, NONE = np.array(np.float32(1 / 256)), np.array(np.uint8(0))
HIDDEN = -1e30
"""What a masked key's score becomes; float32 still holds it after the scale."""
ROUNDS = 41

Ways = Mapping[str, Callable[[int, int], Built]]


def _quantized(graph: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    scale, zero = graph.constant(SCALE), graph.constant(ZERO)
    return graph.one("QuantizeLinear", x, scale, zero), scale, zero


def _product(graph: Builder, data: tuple[ir.Value, ir.Value, ir.Value], columns: int) -> ir.Value:
    codes = graph.constant(graph.rng.integers(-127, 128, (WIDTH, columns), np.int8))
    scales, zeros = np.full(columns, 0.01, np.float32), np.zeros(columns, np.int8)
    parts = (graph.constant(scales), graph.constant(zeros), graph.constant(graph.normal(columns)))
    inputs = (data[0], codes, data[1], parts[0], data[2], parts[1], parts[2])
    return graph.one("MatMulIntegerToFloat", *inputs, domain=MICROSOFT)


def _three_products(batch: int, tokens: int) -> Built:
    graph = Builder()
    data = _quantized(graph, graph.input(graph.normal(batch, tokens, WIDTH)))
    return graph.built(graph.one("Sum", *(_product(graph, data, WIDTH) for _ in range(3))))


def _one_product(batch: int, tokens: int) -> Built:
    graph = Builder()
    data = _quantized(graph, graph.input(graph.normal(batch, tokens, WIDTH)))
    joint = _product(graph, data, 3 * WIDTH)
    return graph.built(graph.one("Sum", *graph.add("Split", joint, outputs=3, axis=-1, num_outputs=3)))


def _norm(fused: bool) -> Callable[[int, int], Built]:
    def made(batch: int, tokens: int) -> Built:
        graph = Builder()
        x, skip = (graph.input(graph.normal(batch, tokens, WIDTH)) for _ in range(2))
        gamma, beta = graph.constant(graph.normal(WIDTH)), graph.constant(graph.normal(WIDTH))
        if fused:
            inputs = (x, skip, gamma, beta)
            return graph.built(graph.one("SkipLayerNormalization", *inputs, domain=MICROSOFT, epsilon=1e-5))
        total = graph.one("Sum", x, skip)
        return graph.built(graph.one("LayerNormalization", total, gamma, beta, axis=-1, epsilon=1e-5))

    return made


def _embeddings(fused: bool) -> Callable[[int, int], Built]:
    """Words, positions and token types, and the norm behind them; the contrib operator reads int32."""

    def made(batch: int, tokens: int) -> Built:
        graph = Builder()
        kind = np.int32 if fused else np.int64
        ids = graph.input(graph.rng.integers(0, 3000, (batch, tokens)).astype(kind))
        types = graph.input(np.zeros((batch, tokens), kind))
        tables = [graph.constant(graph.normal(rows, WIDTH)) for rows in (3000, 512, 2)]
        gamma, beta = graph.constant(graph.normal(WIDTH)), graph.constant(graph.normal(WIDTH))
        if fused:
            inputs = (ids, types, *tables, gamma, beta)
            return graph.built(graph.add("EmbedLayerNormalization", *inputs, domain=MICROSOFT, outputs=2)[0])
        places = graph.constant(np.arange(tokens)[None])
        found = [graph.one("Gather", *pair) for pair in zip(tables, (ids, places, types), strict=True)]
        total = graph.one("Sum", *found)
        return graph.built(graph.one("LayerNormalization", total, gamma, beta, axis=-1, epsilon=1e-5))

    return made


def _scaled_codes(by_channel: bool) -> Callable[[int, int], Built]:
    def made(batch: int, tokens: int) -> Built:
        graph = Builder()
        x = graph.input(graph.normal(batch, tokens, WIDTH))
        if by_channel:
            scales = graph.constant(np.full(WIDTH, 0.05, np.float32))
            zeros = graph.constant(np.full(WIDTH, 128, np.uint8))
            return graph.built(graph.one("QuantizeLinear", x, scales, zeros, axis=-1), ir.DataType.UINT8)
        scaled = graph.one("Mul", x, graph.constant(graph.normal(WIDTH)))
        return graph.built(_quantized(graph, scaled)[0], ir.DataType.UINT8)

    return made


def _gelu(graph: Builder, x: ir.Value) -> ir.Value:
    return graph.one("Gelu", x, domain=MICROSOFT)


def _plain_gelu(batch: int, tokens: int) -> Built:
    graph = Builder()
    x = graph.input(graph.normal(batch, tokens, WIDE))
    return graph.built(_gelu(graph, graph.one("Add", x, graph.constant(graph.normal(WIDE)))))


def _bias_gelu(batch: int, tokens: int) -> Built:
    graph = Builder()
    x, bias = graph.input(graph.normal(batch, tokens, WIDE)), graph.constant(graph.normal(WIDE))
    return graph.built(graph.one("BiasGelu", x, bias, domain=MICROSOFT))


def _gelu_of_codes(by_table: bool) -> Callable[[int, int], Built]:
    def made(batch: int, tokens: int) -> Built:
        graph = Builder()
        x = graph.input(graph.rng.integers(0, 256, (batch, tokens, WIDE), np.uint8))
        if by_table:
            table = graph.constant(graph.rng.integers(0, 256, 256, np.uint8))
            place = graph.one("Cast", x, to=int(ir.DataType.INT32))
            return graph.built(graph.one("Gather", table, place), ir.DataType.UINT8)
        scale, zero = graph.constant(SCALE), graph.constant(ZERO)
        active = _gelu(graph, graph.one("DequantizeLinear", x, scale, zero))
        return graph.built(graph.one("QuantizeLinear", active, scale, zero), ir.DataType.UINT8)

    return made


def _softmax(by_table: bool) -> Callable[[int, int], Built]:
    def made(batch: int, tokens: int) -> Built:
        graph = Builder()
        x = graph.input(graph.rng.integers(0, 256, (batch, HEADS, tokens, tokens), np.uint8))
        ends = [graph.constant(item) for item in (SCALE, ZERO, TO, NONE)]
        if by_table:
            one = graph.one("QLinearSoftmax", x, *ends, domain=MICROSOFT, axis=-1, opset=21)
            return graph.built(one, ir.DataType.UINT8)
        share = graph.one("Softmax", graph.one("DequantizeLinear", x, *ends[:2]), axis=-1)
        return graph.built(graph.one("QuantizeLinear", share, *ends[2:]), ir.DataType.UINT8)

    return made


def _attention(masked: bool, contrib: bool) -> Callable[[int, int], Built]:
    def made(batch: int, tokens: int) -> Built:
        graph = Builder(opset=21 if contrib else 23)
        q, k, v = (graph.input(graph.normal(batch, tokens, WIDTH)) for _ in range(3))
        mask = graph.constant(np.broadcast_to(_padding(batch, tokens), (batch, 1, tokens, tokens)).copy())
        if contrib:
            rest = (None, None, mask) if masked else ()
            one = graph.one("MultiHeadAttention", q, k, v, *rest, domain=MICROSOFT, num_heads=HEADS)
            return graph.built(one)
        inputs = (q, k, v, mask) if masked else (q, k, v)
        return graph.built(graph.one("Attention", *inputs, q_num_heads=HEADS, kv_num_heads=HEADS))

    return made


def _mask_in_a_channel(batch: int, tokens: int) -> Built:
    """The contrib operator without a mask, so that its blocked path stays open: each head gets 4 channels, of
    which one is 1 in the queries and the mask in the keys. They are made before the clock starts."""
    graph = Builder()
    scale = 1 / math.sqrt(SIZE)
    ends = np.zeros((2, batch, tokens, HEADS, 4), np.float32)
    ends[0, ..., 0] = 1
    ends[1, ..., 0] = _padding(batch, tokens).reshape(batch, tokens, 1) / scale
    parts = (graph.normal(batch, tokens, HEADS, SIZE) for _ in range(2))
    q, k = (
        graph.input(np.concatenate([part, end], -1).reshape(batch, tokens, -1))
        for part, end in zip(parts, ends, strict=True)
    )
    v = graph.input(graph.normal(batch, tokens, WIDTH))
    one = graph.one("MultiHeadAttention", q, k, v, domain=MICROSOFT, num_heads=HEADS, scale=scale)
    return graph.built(one)


def _padding(batch: int, tokens: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[batch, 1, 1, tokens]: the last third of every second text is padding."""
    mask = np.zeros((batch, 1, 1, tokens), np.float32)
    mask[1::2, ..., tokens - tokens // 3 :] = HIDDEN
    return mask


BLOCKS: Mapping[str, tuple[tuple[tuple[int, int], ...], Ways]] = {
    "projections": (TOKENS, {"three int8 products": _three_products, "one and a Split": _one_product}),
    "norm": (TOKENS, {"Sum, LayerNormalization": _norm(False), "SkipLayerNormalization": _norm(True)}),
    "embeddings": (
        TOKENS,
        {"three Gather, Sum, norm": _embeddings(False), "EmbedLayerNormalization": _embeddings(True)},
    ),
    "scale and quantize": (
        TOKENS,
        {"Mul, QuantizeLinear": _scaled_codes(False), "QuantizeLinear by channel": _scaled_codes(True)},
    ),
    "gelu": (TOKENS, {"Add, Gelu": _plain_gelu, "BiasGelu": _bias_gelu}),
    "gelu of codes": (
        TOKENS,
        {"dequantize, Gelu, quantize": _gelu_of_codes(False), "table of 256": _gelu_of_codes(True)},
    ),
    "softmax of codes": (
        TOKENS,
        {"dequantize, Softmax, quantize": _softmax(False), "QLinearSoftmax, by table": _softmax(True)},
    ),
    "attention": (
        TOKENS + LONG,
        {
            "Attention of opset 23, mask": _attention(True, contrib=False),
            "the same, no mask": _attention(False, contrib=False),
            "MultiHeadAttention, mask": _attention(True, contrib=True),
            "MultiHeadAttention, no mask": _attention(False, contrib=True),
            "MultiHeadAttention, mask in a channel": _mask_in_a_channel,
        },
    ),
}


def _run(built: Built) -> Callable[[], object]:
    """The model in a session that runs what is written."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    proto = ir.to_proto(built.model).SerializeToString()
    session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, dict(built.feeds))


def main() -> int:
    """Print a table of each block."""
    options = arguments(
        __doc__,
        ("--rounds", {"type": int, "default": ROUNDS, "help": "rounds of each measurement"}),
        ("--only", {"choices": list(BLOCKS), "help": "one block"}),
    )
    report = Report("fusions, by what they are written as")
    for block, (shapes, ways) in BLOCKS.items():
        if options.only not in (None, block):
            continue
        for batch, tokens in shapes:
            runs = {name: _run(make(batch, tokens)) for name, make in ways.items()}
            for name, timing in interleaved(runs, options.rounds).items():
                what = f"{timing.ratio:.2f}x ({timing.low:.2f} to {timing.high:.2f})"
                report.note(f"{block}, {batch} x {tokens}: {name}", f"{what}, {timing.seconds * 1e3:.3f} ms")
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
