# SPDX-License-Identifier: Apache-2.0
"""Weights that are lent to the runtime: the same numbers as from a file, and what must not be lent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from seeded import feeds_for, parse_graph

from splitfold.runtime.session import Optimization, Session
from splitfold.runtime.weightless import lendable, serialized

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'
LAYERS = (
    "net (float[b,40] x) => (float[b,24] y) <float[40,64] W = seeded, float[64,24] V = seeded> "
    "{ h = MatMul(x, W) r = Relu(h) y = MatMul(r, V) }"
)
FED = "net (float[b,40] x, float[40,64] W) => (float[b,64] y) <float[40,64] W = seeded> { y = MatMul(x, W) }"


def model(text: str) -> ir.Model:
    return ir.from_proto(parse_graph(HEAD + text))


@pytest.mark.parametrize("optimization", Optimization)
def test_lent_weights_give_the_numbers_of_a_file(tmp_path: Path, optimization: Optimization) -> None:
    graph = model(LAYERS)
    assert set(lendable(graph)) == {"W", "V"}
    ir.save(graph, tmp_path / "model.onnx")
    feeds = feeds_for(graph, "")
    lent, read = (
        Session(source, optimization=optimization).run(feeds) for source in (graph, tmp_path / "model.onnx")
    )
    assert np.array_equal(lent["y"], read["y"])


def test_the_weights_are_not_in_the_bytes() -> None:
    graph = model(LAYERS)
    lent = lendable(graph)
    size = sum(array.nbytes for array in lent.values())
    assert len(serialized(graph, graph.graph.outputs, lent)) < size / 4
    assert len(serialized(graph, graph.graph.outputs, {})) > size


def test_what_a_caller_may_feed_stays() -> None:
    graph = model(FED)
    weight = graph.graph.initializers["W"]
    assert weight.is_graph_input()
    assert not lendable(graph)
    x = np.ones((2, 40), np.float32)
    other = np.full((40, 64), 0.5, np.float32)
    assert np.allclose(Session(graph).run({"x": x, "W": other})["y"], 20)


def test_weights_in_any_order_of_axes() -> None:
    graph = model(LAYERS)
    weight = graph.graph.initializers["W"]
    assert weight.const_value is not None
    before = Session(graph).run(feeds := feeds_for(graph, ""))["y"]
    array = np.asfortranarray(weight.const_value.numpy())
    weight.const_value = ir.Tensor(array, name="W")
    assert not array.flags.c_contiguous
    assert np.array_equal(Session(graph).run(feeds)["y"], before)
