# SPDX-License-Identifier: Apache-2.0
"""One graph of an ONNX model, node by node, into a torch.fx graph."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.fx

from splitfold.runtime.lift.carried import Kind
from splitfold.runtime.lift.check import attributes_of
from splitfold.runtime.lift.constants import constant_of, register
from splitfold.runtime.lift.demand import running_order, wanted_on_host
from splitfold.runtime.lift.dtypes import integer_range
from splitfold.runtime.lift.forms import ANCHOR, Held, Values
from splitfold.runtime.lift.lifted import ORIGIN, Origin
from splitfold.runtime.lift.row import Extra, Row
from splitfold.runtime.lift.table import find_row

__all__ = ["Build", "GraphBuilder"]

_NO_CODES = ir.DataType.UNDEFINED


@dataclass(frozen=True)
class Build:
    """What all graphs of one model share: opsets by domain, and the names of constants by their keys."""

    opsets: Mapping[str, int]
    parameters: dict[str, str]

    def find(self, node: ir.Node) -> Row | None:
        """Return the row of a node; constants have none."""
        return find_row(node, self.opsets)

    def fixed(self, node: ir.Node, position: int) -> bool:
        """Whether a node reads its input at `position` as something that is not to be trained."""
        row = self.find(node)
        return row is not None and (position in row.fixed or row.on_the_host(position))


@dataclass
class _Emission:
    """A call that is about to be added for a node."""

    function: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    kind: Kind
    codes: ir.DataType = _NO_CODES


class GraphBuilder:
    """Builds the lifted graph of one ONNX graph.

    Args:
        graph: the graph.
        build: what all graphs of the model share.
        outer: the builder of the graph around, for a subgraph.
        key: what keys of this graph's constants begin with.
        place: what names of this graph's parameters begin with.
    """

    def __init__(
        self, graph: ir.Graph, build: Build, outer: GraphBuilder | None = None, key: str = "", place: str = ""
    ) -> None:
        self._source, self._build = graph, build
        self._key, self._place = key, place
        self._graph = torch.fx.Graph()
        self._origin: Origin | None = None
        self._order = running_order(graph)
        self._wanted = wanted_on_host(self._order, build.find)
        around = None if outer is None else outer.values
        self.values: Values = Values(graph, self._graph, self._call, around, build.fixed)

    def module(self, name: str) -> torch.fx.GraphModule:
        """Build and return the module; its inputs are captured values, then the graph's inputs."""
        for value in self._source.inputs:
            if not value.is_initializer():
                self.values.hold(value, Held(Kind.TENSOR, self.values.placeholder(value.name or "input")))
        for node in self._order:
            if not node.outputs or constant_of(node.outputs[0]) is None:
                self._lift(node)
        self._origin = None
        self._graph.output(tuple(self.values.tensor(value) for value in self._source.outputs))
        for value_name, found in self.values.constants.items():
            self._build.parameters[self._key + value_name] = self._place + found
        module = torch.fx.GraphModule(self.values.root, self._graph, name)
        if hasattr(module, ANCHOR):  # it was copied as a buffer that is saved
            delattr(module, ANCHOR)
        module.register_buffer(ANCHOR, torch.empty(0), persistent=False)
        return module

    def _lift(self, node: ir.Node) -> None:
        self._origin = Origin(node.name or "", node.op_type, node.domain, dict(node.metadata_props))
        row = self._build.find(node)
        if row is None:
            raise ValueError(f"{node.name} has no row")
        attributes = attributes_of(node)
        early = row.on_host is not None and (not row.creates or node.outputs[0] in self._wanted)
        if early and (self._fold(node, row, attributes) or self._lift_on_host(node, row, attributes)):
            return
        self._emit(node, row, self._emission(node, row, attributes))

    def _fold(self, node: ir.Node, row: Row, attributes: dict[str, Any]) -> bool:
        """Compute a node now if all that it reads is constant integers; return whether it was."""
        held = [self.values.look(value) for value in node.inputs if value is not None]
        if row.on_host is None or not held or not all(_is_integer(item.array) for item in held):
            return False
        arrays = [None if value is None else self.values.look(value).array for value in node.inputs]
        found = row.on_host(*arrays, **attributes, **_told(row, node))
        for output, array in zip(node.outputs, found if row.many else (found,), strict=False):
            self.values.hold(output, Held(Kind.HOST, array=np.asarray(array)))
        return True

    def _lift_on_host(self, node: ir.Node, row: Row, attributes: dict[str, Any]) -> bool:
        """Let a node run on numpy arrays if all that it reads is on the host; return whether it can."""
        held = [self.values.look(value) for value in node.inputs if value is not None]
        if any(item.kind is not Kind.HOST for item in held) or all(item.node is None for item in held):
            return False
        arguments = tuple(None if value is None else self.values.host(value) for value in node.inputs)
        keywords = {**attributes, **_told(row, node)}
        self._emit(node, row, _Emission(row.on_host, arguments, keywords, Kind.HOST))
        return True

    def _emission(self, node: ir.Node, row: Row, attributes: dict[str, Any]) -> _Emission:
        arguments = [self._argument(row, position, value) for position, value in enumerate(node.inputs)]
        while arguments and arguments[-1] is None:
            arguments.pop()
        codes = row.gives_codes(node) if row.gives_codes is not None else _NO_CODES
        if row.passes_codes and node.inputs[0] is not None:
            codes = self.values.look(node.inputs[0]).codes
        keywords = {**attributes, **_told(row, node)}
        for name, attribute in attributes.items():
            if isinstance(attribute, ir.Graph):
                keywords[name] = self._subgraph(node, name, attribute)
        if Extra.ANCHOR in row.extras:
            keywords[Extra.ANCHOR.value] = self.values.anchor()
        if Extra.RANGE in row.extras:
            keywords[Extra.RANGE.value] = None if codes is _NO_CODES else integer_range(codes)
        kind = Kind.HOST if row.gives_host else Kind.TENSOR
        return _Emission(row.function, tuple(arguments), keywords, kind, codes)

    def _argument(self, row: Row, position: int, value: ir.Value | None) -> Any:
        if value is None:
            return None
        if row.on_the_host(position):
            return self.values.host(value)
        if position in row.scalars:
            return self.values.scalar(value)
        if position in row.codes or (row.passes_codes and position == 0):
            return self.values.codes(value)
        return self.values.tensor(value)

    def _emit(self, node: ir.Node, row: Row, emission: _Emission) -> None:
        title = (node.name or node.op_type) if row.many else node.outputs[0].name
        call = self._call(emission.function, emission.arguments, title, emission.keywords)
        for index, output in enumerate(node.outputs):
            if not output.name and not output.uses():
                continue
            made = self._call(operator.getitem, (call, index), output.name) if row.many else call
            is_codes = index == 0 and emission.codes is not _NO_CODES
            kind = Kind.CODES if is_codes else emission.kind
            self.values.hold(output, Held(kind, made, codes=emission.codes if is_codes else _NO_CODES))

    def _call(
        self,
        function: Any,
        arguments: tuple[Any, ...],
        name: str | None,
        keywords: Mapping[str, Any] | None = None,
    ) -> torch.fx.Node:
        made = self._graph.create_node("call_function", function, arguments, dict(keywords or {}), name)
        if self._origin is not None:
            made.meta[ORIGIN] = self._origin
        return made

    def _subgraph(self, node: ir.Node, attribute: str, graph: ir.Graph) -> Any:
        """Return (module, captured values) of a subgraph, as the functions of control flow take it."""
        title = f"{node.outputs[0].name}/{attribute}"
        name = register(self.values.root, title.replace(".", "_"), torch.nn.Module())
        inner = GraphBuilder(graph, self._build, self, f"{self._key}{title}/", f"{self._place}{name}.")
        self.values.root._modules[name] = inner.module("Subgraph")
        captured = tuple(self.values.capturable(value) for value in inner.values.captured)
        return self._graph.get_attr(name), captured


def _is_integer(array: Any) -> bool:
    return array is not None and np.asarray(array).dtype.kind in "iub"


def _told(row: Row, node: ir.Node) -> dict[str, Any]:
    if Extra.OUTPUTS not in row.extras:
        return {}
    named = [index for index, output in enumerate(node.outputs) if output.name]
    return {Extra.OUTPUTS.value: max(named, default=0) + 1}
