# SPDX-License-Identifier: Apache-2.0
"""A model run in slices: each computes some values and what later slices need, so that memory stays bounded.

A slice is a part of the main graph. Between slices only values that a later one reads are held; the weights
of a slice are in memory while its session is open.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from splitfold.passes.submodel import nodes_between, read_values, submodel
from splitfold.runtime.errors import SessionError
from splitfold.runtime.feeds import Array
from splitfold.runtime.session import Optimization, Session
from splitfold.runtime.target import Target

__all__ = ["Slice", "halves", "partition", "slice_model", "unreadable"]

_READABLE = {
    ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BOOL,
    ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64,
    ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64,
}  # fmt: skip


@dataclass
class Slice:
    """One part of a model.

    Attributes:
        model: the whole model.
        target: where it runs.
        given: names of the values it reads from before it, inputs of the model included.
        wanted: names of the values that are asked for.
        leaving: names of all values it computes that are read later, or wanted.
        after: names of all values that a later slice needs.
    """

    model: ir.Model
    target: Target
    given: tuple[str, ...]
    wanted: tuple[str, ...]
    leaving: tuple[str, ...]
    after: frozenset[str]
    _session: Session | None = field(default=None, repr=False)

    def run(self, held: Mapping[str, Array]) -> dict[str, Array]:
        """Return the values in `leaving`, computed from those in `held`; the session stays open."""
        if not self.leaving:
            return {}
        feeds = {name: held[name] for name in self.given}
        if self._session is None:
            self._session = self._open(feeds)
        return self._session.run({name: feeds[name] for name in self._session.inputs})

    def close(self) -> None:
        """Give the session's memory back."""
        self._session = None

    def _open(self, feeds: Mapping[str, Array]) -> Session:
        """Open the part with inputs of any size, or where the runtime wants to know the length of a list of
        integers, from which it infers a rank, with that."""
        try:
            return Session(self._part(feeds, fixed=False), self.target, optimization=Optimization.OFF)
        except SessionError:
            return Session(self._part(feeds, fixed=True), self.target, optimization=Optimization.OFF)

    def _part(self, feeds: Mapping[str, Array], *, fixed: bool) -> ir.Model:
        inputs = {value.name for value in self.model.graph.inputs if value.shape is not None}
        part = submodel(self.model, self.leaving, [name for name in self.given if name not in inputs])
        for value in part.graph.inputs:
            array = feeds[value.name or ""]
            if array.dtype.kind == "O":  # texts
                continue
            if value.type is None or value.dtype != ir.DataType.from_numpy(array.dtype):
                value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
            if value.name not in inputs:
                known = fixed and array.ndim == 1 and array.dtype.kind in "iu"
                value.shape = ir.Shape(array.shape if known else [None] * array.ndim)
        return part


def slice_model(
    model: ir.Model, wanted: Sequence[Sequence[str]], target: Target, keep: Sequence[Collection[str]] = ()
) -> list[Slice]:
    """Return one slice for each list of names in `wanted`, each reading what those before it computed.

    Args:
        model: the model; it is not changed.
        wanted: names of values of the main graph, in an order in which they can be computed.
        target: where it runs.
        keep: for each slice, names of values of earlier ones that are needed while it runs, beside what it
            reads itself.
    """
    values = {value.name: value for node in model.graph for value in node.outputs if value.name}
    made: set[ir.Value] = set()
    computed: list[set[ir.Value]] = []
    read: list[set[str]] = []
    for names in wanted:
        nodes = nodes_between([values[name] for name in names if values[name] not in made], made)
        new = {value for node in nodes for value in node.outputs}
        read.append({value.name or "" for node in nodes for value in _data_read(node) if value not in new})
        computed.append(new)
        made |= {value for value in new if not unreadable(value)}  # others cannot be held: computed again
    slices: list[Slice] = []
    later: set[str] = set()
    for index in range(len(wanted) - 1, -1, -1):
        own = {value.name or "" for value in computed[index]}
        leaving = [name for name in sorted(own) if name in later or name in wanted[index]]
        given, asked = tuple(sorted(read[index])), tuple(wanted[index])
        slices.insert(0, Slice(model, target, given, asked, tuple(leaving), frozenset(later)))
        missing = {name for name in wanted[index] if name not in own}  # computed by an earlier slice already
        later |= read[index] | missing | set(keep[index] if keep else ())
    return slices


def _data_read(node: ir.Node) -> list[ir.Value]:
    """Return what `node` reads that is no constant."""
    return [v for v in read_values(node) if v.is_graph_input() or not v.is_initializer()]


def halves(part: Slice) -> list[Slice]:
    """Return the two halves of a slice that no later one reads, each as a slice of its own; none where only
    one value is asked for."""
    middle = len(part.wanted) // 2
    names = [part.wanted[:middle], part.wanted[middle:]] if middle else []
    return [slice_model(part.model, [half], part.target)[0] for half in names]


def partition(
    model: ir.Model, names: Sequence[str], limit: int, sizes: Mapping[str, int] | None = None
) -> list[list[str]]:
    """Return `names` in runs of which each needs at most `limit` bytes (one name may need more by itself).

    Args:
        model: the model that computes them.
        names: values of the main graph, in an order in which they can be computed.
        limit: bytes for the weights that a run reads, and the values in it.
        sizes: bytes of each value; absent ones count nothing.
    """
    values = {value.name: value for node in model.graph for value in node.outputs if value.name}
    runs: list[list[str]] = []
    made: set[ir.Value] = set()
    weights: dict[str, int] = {}
    held = 0
    for name in names:
        nodes = nodes_between([values[name]] if values[name] not in made else [], made)
        made |= {value for node in nodes for value in node.outputs if not unreadable(value)}
        new = {key: size for node in nodes for key, size in _weights(node).items()}
        cost = (sizes or {}).get(name, 0)
        grown = held + cost + sum(size for key, size in new.items() if key not in weights)
        if not runs or grown > limit:
            runs.append([])
            weights, grown = {}, cost + sum(new.values())
        runs[-1].append(name)
        weights |= new
        held = grown
    return runs


def _weights(node: ir.Node) -> dict[str, int]:
    return {
        value.name or "": value.const_value.nbytes
        for value in read_values(node)
        if value.const_value is not None and value.is_initializer()
    }


def unreadable(value: ir.Value) -> str:
    """Return why the value cannot be read as an array of numbers, or an empty text."""
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        return "it is no tensor"
    if value.dtype is not None and value.dtype not in _READABLE:
        return f"it holds {value.dtype.name}, which is not compared"
    return ""
