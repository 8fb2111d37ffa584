# SPDX-License-Identifier: Apache-2.0
"""The values of a graph that is being lifted: each in the form that its reader wants."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.fx

from splitfold.runtime.errors import UnsupportedError
from splitfold.runtime.lift.carried import Kind, from_codes, host_array, to_host, to_torch
from splitfold.runtime.lift.constants import constant_of, is_small_integer, register, trainable
from splitfold.runtime.lift.dtypes import NARROW, TORCH, to_tensor
from splitfold.runtime.lift.lifted import VALUE

__all__ = ["ANCHOR", "Held", "Values"]

ANCHOR = "anchor"
"""Name of the empty buffer that tells on which device new tensors are made."""
_FEW = 16
"""Elements up to which a float constant may be used on the host, beside numbers that come from a shape."""


@dataclass
class Held:
    """A value: a node of the lifted graph in some form, or a small constant."""

    kind: Kind
    node: torch.fx.Node | None = None
    array: Any = None
    """The numbers of a small constant."""
    codes: ir.DataType = ir.DataType.UNDEFINED
    """What quantized numbers are that are carried as floats."""


Call = Callable[[Any, tuple[Any, ...], str | None], torch.fx.Node]
"""Adds a call of a function on arguments, under a name, to the lifted graph."""


class Values:
    """The values of one graph by their ONNX value.

    Args:
        source: the ONNX graph.
        graph: the lifted graph, to which conversions and reads of constants are added.
        call: adds a call to it.
        outer: the values of the graph around, for a subgraph.
        fixed: whether a node reads an input as something that is not to be trained.
    """

    def __init__(
        self,
        source: ir.Graph,
        graph: torch.fx.Graph,
        call: Call,
        outer: Values | None,
        fixed: Callable[[ir.Node, int], bool],
    ) -> None:
        self._source, self._graph, self._call = source, graph, call
        self._outer, self._fixed = outer, fixed
        self._held: dict[ir.Value, Held] = {}
        self._forms: dict[tuple[ir.Value, str], torch.fx.Node] = {}
        self._anchor: torch.fx.Node | None = None
        self.root = torch.nn.Module()
        """Where parameters and buffers of the graph are registered."""
        self.root.register_buffer(ANCHOR, torch.empty(0), persistent=False)
        self.captured: list[ir.Value] = []
        """Values of the graphs around that this one reads, in the order of its first placeholders."""
        self.names: dict[str, str] = {}
        """Name of the lifted node by ONNX value name."""
        self.constants: dict[str, str] = {}
        """Name of the parameter or buffer by ONNX value name."""

    def hold(self, value: ir.Value, held: Held) -> None:
        """Remember what `value` is."""
        self._held[value] = held
        if value.name and held.node is not None:
            held.node.meta[VALUE] = value.name
            self.names[value.name] = held.node.name

    def look(self, value: ir.Value) -> Held:
        """Return what `value` is.

        Raises:
            UnsupportedError: nothing computes it.
        """
        if value not in self._held:
            self._held[value] = self._found(value)
        return self._held[value]

    def _found(self, value: ir.Value) -> Held:
        tensor = constant_of(value)
        if tensor is not None:
            few = is_small_integer(tensor) or (tensor.size <= _FEW and tensor.dtype.is_floating_point())
            return Held(Kind.HOST, array=tensor.numpy()) if few else Held(Kind.TENSOR)
        if self._outer is None:
            raise UnsupportedError(f"no node computes '{value.name}': the model is not valid.")
        outer = self._outer.look(value)
        if outer.array is not None:
            return Held(Kind.HOST, array=outer.array)
        return Held(outer.kind, self._capture(value), codes=outer.codes)

    def _capture(self, value: ir.Value) -> torch.fx.Node:
        """Add a placeholder behind those that are there for captured values already."""
        nodes = list(self._graph.nodes)[len(self.captured) :]
        with self._graph.inserting_before(nodes[0]) if nodes else contextlib.nullcontext():
            node = self.placeholder(f"outer_{value.name}")
        self.captured.append(value)
        return node

    def placeholder(self, name: str) -> torch.fx.Node:
        """Add an argument of the module, under a name that Python allows."""
        node = self._graph.create_node("placeholder", "argument", name=name)
        node.target = node.name
        return node

    def capturable(self, value: ir.Value) -> torch.fx.Node:
        """Return `value` in the form in which a subgraph that reads it takes it."""
        return self.look(value).node or self.tensor(value)

    # Forms

    def tensor(self, value: ir.Value) -> torch.fx.Node:
        """Return `value` as a tensor."""
        held = self.look(value)
        if held.kind is Kind.TENSOR and held.node is not None:
            return held.node
        return self._form(value, "tensor", self._as_tensor)

    def _as_tensor(self, value: ir.Value) -> torch.fx.Node:
        held = self.look(value)
        if held.kind is Kind.CODES:
            return self._call(from_codes, (held.node, _torch_type(held.codes)), value.name)
        if held.node is not None:
            return self._call(to_torch, (held.node, self.anchor()), value.name)
        tensor = constant_of(value)
        if tensor is None:
            return self._constant(value, ir.tensor(np.ascontiguousarray(held.array)), train=False)
        owner = value.graph if value.is_initializer() else value.producer().graph  # type: ignore[union-attr]
        if owner is not self._source and self._outer is not None:
            return self._capture(value)
        return self._constant(value, tensor, train=trainable(value, tensor, self._fixed))

    def _constant(self, value: ir.Value, tensor: ir.TensorProtocol, *, train: bool) -> torch.fx.Node:
        held = to_tensor(tensor)
        if held.dtype.is_floating_point and held.element_size() > 1:
            held = torch.nn.Parameter(held, requires_grad=train)
        name = register(self.root, value.name or "constant", held)
        node = self._graph.create_node("get_attr", name, name=value.name)
        if value.name:
            node.meta[VALUE] = value.name
            self.constants[value.name] = name
            self.names[value.name] = node.name
        return node

    def host(self, value: ir.Value) -> Any:
        """Return `value` as numbers of the host: a constant of integers itself, else a node."""
        held = self.look(value)
        if held.array is not None:
            return self._baked(value, np.asarray(held.array))
        if held.kind is Kind.HOST:
            return held.node
        return self._form(value, "host", self._as_host)

    def _as_host(self, value: ir.Value) -> torch.fx.Node:
        return self._call(to_host, (self.tensor(value),), f"{value.name}_on_host")

    def _baked(self, value: ir.Value, array: Any) -> Any:
        if array.dtype in (np.int64, np.bool_) and array.ndim < 2:
            return _tuples(array.tolist())
        arguments = (_tuples(array.tolist()), array.dtype.name)
        return self._form(value, "host", lambda _: self._call(host_array, arguments, value.name))

    def scalar(self, value: ir.Value) -> Any:
        """Return a constant of rank 0 as a Python number, anything else as a tensor."""
        array = self.look(value).array
        return array.item() if array is not None and not np.ndim(array) else self.tensor(value)

    def codes(self, value: ir.Value) -> torch.fx.Node:
        """Return quantized numbers as they are carried."""
        held = self.look(value)
        return held.node if held.kind is Kind.CODES and held.node is not None else self.tensor(value)

    def anchor(self) -> torch.fx.Node:
        """Return the node of the empty buffer."""
        if self._anchor is None:
            self._anchor = self._graph.get_attr(ANCHOR)
        return self._anchor

    def _form(self, value: ir.Value, form: str, make: Callable[[ir.Value], torch.fx.Node]) -> torch.fx.Node:
        if (value, form) not in self._forms:
            self._forms[value, form] = make(value)
        return self._forms[value, form]


def _tuples(values: Any) -> Any:
    return tuple(map(_tuples, values)) if isinstance(values, list) else values


def _torch_type(kind: ir.DataType) -> torch.dtype:
    return NARROW[kind] if kind in NARROW else TORCH[kind]
