# SPDX-License-Identifier: Apache-2.0
"""Small models for the tests of lifting, and what compares a lifted model with the runtime."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch
from onnx import TensorProto, helper, numpy_helper

from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.lift import Lifted, lift
from splitfold.runtime.session import Optimization, Session

__all__ = ["largest_difference", "model_of", "one_node", "reference"]

TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.bool_): TensorProto.BOOL,
}


def model_of(text: str, **weights: Array) -> ir.Model:
    """Return the model of an ONNX text with these initializers."""
    tensors = [ir.tensor(array, name=name) for name, array in weights.items()]
    return ir.from_onnx_text(text, initializers=tensors)


def one_node(
    operator: str,
    arrays: Mapping[str, Array | None],
    outputs: Mapping[str, int],
    *,
    fed: int = 1,
    first: int = 0,
    domain: str = "com.microsoft",
    version: int = 21,
    **attributes: object,
) -> tuple[ir.Model, dict[str, Array]]:
    """Return a model of one node and its feeds.

    Of its inputs, `fed` from `first` on are inputs of the graph, others initializers; None is an omitted one.
    A blank output is omitted.
    """
    named = [name if array is not None else "" for name, array in arrays.items()]
    feeds = {name: array for name in named[first : first + fed] if (array := arrays[name]) is not None}
    node = helper.make_node(
        operator, named, [name.strip() for name in outputs], name="node", domain=domain, **attributes
    )
    weights = {n: a for n, a in arrays.items() if a is not None and n not in feeds}
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info(n, TYPES[a.dtype], a.shape) for n, a in feeds.items()],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items() if name.strip()],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    opsets = [helper.make_opsetid("", version), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10)), feeds


def reference(model: ir.Model, feeds: Feeds) -> dict[str, Array]:
    """Return what the runtime computes, node by node."""
    return Session(model, threads=1, optimization=Optimization.OFF).run(feeds)


def largest_difference(model: ir.Model, feeds: Feeds, lifted: Lifted | None = None) -> float:
    """Return how far the lifted model is from the runtime, in units of an output's largest
    number where that is above 1."""
    lifted = lifted or lift(model)
    expected, found = reference(model, feeds), lifted.run(feeds)
    assert list(expected) == list(found)
    return max(_difference(array, found[name], name) for name, array in expected.items())


def _difference(expected: Array, found: torch.Tensor, name: str) -> float:
    assert tuple(found.shape) == expected.shape, name
    assert str(found.dtype).removeprefix("torch.") == expected.dtype.name, name
    wide = expected.astype(np.float64)
    scale = max(1.0, float(np.abs(wide).max(initial=0)))
    return float(np.abs(wide - found.detach().double().numpy()).max(initial=0)) / scale
