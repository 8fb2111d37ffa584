# SPDX-License-Identifier: Apache-2.0
"""Compute a line that is clipped to [0, 1] in one operator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.identity import display_layer
from splitfold.passes.values import constant, drop_unused, emit, replace_value, sole_consumer

__all__ = ["FoldClipsPass"]

_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_TERMS = {"Add", "Div", "Mul", "Sub"}


@dataclass(frozen=True)
class FoldClipsPass(LayerPass):
    """Compute ``Clip(a x + b, 0, 1)`` as one HardSigmoid. Exact but for rounding.

    Clipped softmax as PyTorch exports it is Mul, Add and Clip, three walks through the probabilities; so are
    hard gates.

    Before::

        y = Clip(Add(Mul(x, a), b), 0, 1)

    After::

        y = HardSigmoid<alpha = a, beta = b>(x)
    """

    name: ClassVar[str] = "fold-clips"
    contract: ClassVar[Contract] = Contract.EXACT
    takes: ClassVar[str] = "a Clip to [0, 1] behind Mul, Div, Add or Sub with constant numbers"

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        lines = [found for graph in model.graphs() for found in _lines(graph)]
        self.check_patterns(display_layer(line.clip) for line in lines)
        before = len(findings.applied)
        for line in lines:
            layer = display_layer(line.clip)
            if (reason := self.unwanted(layer)) is not None:
                findings.skip(layer, reason)
                continue
            line.fold()
            findings.apply(
                layer, f"{len(line.terms)} operators and a Clip to one HardSigmoid: {line.slope:.6g} x "
                f"{line.offset:+.6g}"
            )  # fmt: skip
        return len(findings.applied) > before


@dataclass(frozen=True, eq=False)
class _Line:
    """slope * x + offset, clipped to [0, 1]; `terms` compute it, the last first."""

    clip: ir.Node
    x: ir.Value
    slope: float
    offset: float
    terms: tuple[ir.Node, ...]

    def fold(self) -> None:
        """Put one operator in the place of all."""
        old = self.clip.outputs[0]
        attributes = {"alpha": self.slope, "beta": self.offset}
        made = emit(
            self.clip,
            "HardSigmoid",
            [self.x],
            origins=self.terms,
            attributes=attributes,
            names=[f"{old.name}_folded"],
            like=old,
        )
        replace_value(old, made)
        drop_unused([self.clip, *self.terms])


def _lines(graph: ir.Graph | ir.GraphView) -> Iterator[_Line]:
    for clip in graph:
        if clip.op_type != "Clip" or clip.domain != "" or [_number(v) for v in clip.inputs[1:]] != [0.0, 1.0]:
            continue
        line = _line(clip)
        if line is not None:
            yield line


def _line(clip: ir.Node) -> _Line | None:
    """Return the line that a Clip cuts, or None where there is nothing before it to fold."""
    value, slope, offset, terms = clip.inputs[0], 1.0, 0.0, []
    while value is not None and value.dtype in _DTYPES:
        node = value.producer()
        term = _term(node) if node is not None and sole_consumer(value) is not None else None
        if node is None or term is None:
            break
        value, factor, shift = term
        slope, offset = slope * factor, offset + slope * shift
        terms.append(node)
    numbers = np.array([slope, offset], np.float32)
    if value is None or not terms or not np.isfinite(numbers).all() or numbers[0] == 0:
        return None
    return _Line(clip, value, float(numbers[0]), float(numbers[1]), tuple(terms))


def _term(node: ir.Node) -> tuple[ir.Value, float, float] | None:
    """Return x, a and b where a node computes a x + b with constant numbers, else None."""
    if node.domain != "" or node.op_type not in _TERMS or len(node.inputs) != 2:
        return None
    for position in (1, 0):
        x, number = node.inputs[1 - position], _number(node.inputs[position])
        if x is None or number is None or constant(x) is not None or _widens(node.inputs[position], x):
            continue
        if node.op_type == "Mul":
            return x, number, 0.0
        if node.op_type == "Add":
            return x, 1.0, number
        if node.op_type == "Sub":
            return (x, 1.0, -number) if position == 1 else (x, -1.0, number)
        if position == 1 and number != 0:
            return x, 1 / number, 0.0
    return None


def _number(value: ir.Value | None) -> float | None:
    tensor = constant(value)
    return float(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None


def _widens(number: ir.Value | None, x: ir.Value) -> bool:
    """Whether a constant of one element has more axes than what it is combined with."""
    rank = len(number.shape) if number is not None and number.shape is not None else 0
    return rank > (len(x.shape) if x.shape is not None else 0)
