# SPDX-License-Identifier: Apache-2.0
"""What a row of the operator table says: the function of an operator, and how it reads its inputs."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

__all__ = ["Attributes", "Extra", "Row", "Rows", "since"]

Attributes = Mapping[str, Any]
"""Attributes of a node by name, as Python values (a tensor of one element is a pair of number and dtype)."""


class Extra(enum.Enum):
    """What a function wants to be told besides inputs and attributes; the value is the keyword."""

    OUTPUTS = "outputs"
    """The number of outputs that the node names."""
    ANCHOR = "anchor"
    """An empty tensor on the module's device: where new tensors are made."""
    RANGE = "limits"
    """Least and largest quantized number of the first output, or None where it is not quantized."""


@dataclass(frozen=True)
class Row:
    """How one operator type is computed.

    Args:
        function: takes the inputs by position (None is an omitted one), attributes as keyword-only arguments
            of their ONNX names. An attribute that it does not take is refused, so none is ignored.
        host: positions of inputs that are read as numbers on the host (shapes, axes, bounds): a tuple of
            integers, or a numpy array.
        rest_on_host: the last of `host` stands for all inputs after it too.
        scalars: positions where a constant of rank 0 is passed as a Python number, anything else as a tensor.
        on_host: computes the operator on numpy arrays and integers; used where all inputs are on the host.
        creates: `on_host` is used only where some consumer reads the result on the host: it may be large.
        gives_host: the output is on the host (Shape, Size).
        many: the function returns a tuple of outputs, also where there is one.
        codes: positions where quantized numbers may come as a float tensor that gradients pass through.
        gives_codes: returns the integer type that the first output holds in such a tensor.
        passes_codes: the first output is in the form that the first input is in.
        fixed: positions of inputs which are no weights to train (statistics, scales of quantizers).
        extras: what else the function is told.
        since: the opset from which this holds; before, it is `earlier`.
        earlier: the row of older opsets.
        refuses: returns why a node with these attributes is not handled, or None.
    """

    function: Callable[..., Any]
    host: tuple[int, ...] = ()
    rest_on_host: bool = False
    scalars: tuple[int, ...] = ()
    on_host: Callable[..., Any] | None = None
    creates: bool = False
    gives_host: bool = False
    many: bool = False
    codes: tuple[int, ...] = ()
    gives_codes: Callable[[ir.Node], ir.DataType] | None = None
    passes_codes: bool = False
    fixed: tuple[int, ...] = ()
    extras: tuple[Extra, ...] = ()
    since: int = 1
    earlier: Row | None = None
    refuses: Callable[[ir.Node, Attributes], str | None] | None = None

    def at(self, opset: int) -> Row | None:
        """Return the row that holds in `opset`, or None."""
        row: Row | None = self
        while row is not None and opset < row.since:
            row = row.earlier
        return row

    def on_the_host(self, position: int) -> bool:
        """Whether the input at `position` is read on the host."""
        return position in self.host or (self.rest_on_host and position >= self.host[-1])

    def problem(self, node: ir.Node, attributes: Attributes) -> str | None:
        """Return why `node` with its `attributes` is not handled, or None."""
        unknown = sorted(set(attributes) - _keywords(self.function))
        if unknown:
            return f"its attribute '{unknown[0]}' is not handled"
        return self.refuses(node, attributes) if self.refuses is not None else None


Rows = Mapping[str, Row]
"""Rows by operator type, of one domain."""


def _keywords(function: Callable[..., Any]) -> set[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a function of torch itself: all of it is positional
        return set()
    extras = {extra.value for extra in Extra}
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - extras


def since(opset: int, row: Row, earlier: Row) -> Row:
    """Return `row` from `opset` on, `earlier` before."""
    return replace(row, since=opset, earlier=earlier)
