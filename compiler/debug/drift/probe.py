# SPDX-License-Identifier: Apache-2.0
"""Shapes and types of the values of a model, found by running it, without holding the values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from splitfold.compiler.debug.drift.slices import partition, slice_model
from splitfold.runtime.feeds import Feeds
from splitfold.runtime.target import Target

__all__ = ["Seen", "probe"]


@dataclass(frozen=True)
class Seen:
    """Shape and element type of a value on one batch."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def probe(model: ir.Model, names: Sequence[str], feeds: Feeds, target: Target, limit: int) -> dict[str, Seen]:
    """Return what each of `names` is when `model` runs on `feeds`; no more than `limit` bytes of weights are
    opened at once, where one value's own allow it.

    Raises:
        SessionError: the model does not run.
    """
    asking = model.clone()
    values = {value.name: value for node in asking.graph for value in node.outputs if value.name}
    for name in names:
        _ask(asking.graph, values[name])
    runs = partition(model, names, limit)
    held = dict(feeds)
    found: dict[str, Seen] = {}
    parts = slice_model(asking, [_answers(run) for run in runs], target)
    for run, part in zip(runs, parts, strict=True):
        given = part.run(held)
        part.close()
        for name in run:
            shape, sample = given[f"{name}__shape"], given[f"{name}__sample"]
            found[name] = Seen(tuple(int(size) for size in shape), sample.dtype)
        held = {name: array for name, array in {**held, **given}.items() if name in part.after}
    return found


def _answers(names: Sequence[str]) -> list[str]:
    return [f"{name}__{what}" for name in names for what in ("shape", "sample")]


def _ask(graph: ir.Graph, value: ir.Value) -> None:
    """Let the graph compute the shape of `value`, and an empty vector of its type."""
    flat = ir.Value(name=f"{value.name}__flat")
    nodes = [
        ir.node("Shape", [value], outputs=[ir.Value(name=f"{value.name}__shape")]),
        ir.node("Reshape", [value, _constant(graph, "__all_of_it", [-1])], outputs=[flat]),
        ir.node(
            "Gather",
            [flat, _constant(graph, "__none_of_it", [])],
            outputs=[ir.Value(name=f"{value.name}__sample")],
        ),
    ]
    graph.extend(nodes)


def _constant(graph: ir.Graph, name: str, numbers: Sequence[int]) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(numbers, np.int64), name=name)
        made = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)  # type: ignore[arg-type]
        graph.register_initializer(made)
    return graph.initializers[name]
