# SPDX-License-Identifier: Apache-2.0
"""The stored bits of a file's weights, whoever wrote it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

__all__ = ["stored_bits"]

LINEAR = ("MatMul", "Gemm")
CONSTANT_OPERATORS = ("DequantizeLinear", "Transpose", "Reshape", "Cast")
"""What may stand between a stored weight and the layer that reads it."""


def stored_bits(file: Path, original: Path) -> float:
    """Bits that `file` stores for each weight of the MatMuls and Gemms of `original`, a float model.

    Counted are all constants from which the weights come: codes with their padding, scales, zero points,
    weights left in float; and the vectors by which layers' inputs are multiplied, less those of `original`.
    A constant of several layers counts once.
    """
    before, after = ir.load(original).graph, ir.load(file).graph
    weights = sum(_elements(constant) for constant in _unique(_weight_constants(before)))
    scales = _nbytes(_unique(_input_scales(after))) - _nbytes(_unique(_input_scales(before)))
    return 8 * (_nbytes(_unique(_weight_constants(after))) + max(scales, 0)) / weights


def _elements(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.size


def _nbytes(values: Iterable[ir.Value]) -> int:
    return sum(0 if value.const_value is None else value.const_value.nbytes for value in values)


def _unique(values: Iterable[ir.Value]) -> list[ir.Value]:
    return list(dict.fromkeys(values))


def _weight_constants(graph: ir.Graph) -> list[ir.Value]:
    """The constants of all layers' weights: of each layer all that its weight comes from."""
    found: list[ir.Value] = []
    for node in graph.all_nodes():
        if node.op_type == "MatMulNBits":
            found += [value for value in node.inputs[1:4] if value is not None]
        elif node.op_type in LINEAR:
            for value in node.inputs[:2]:
                found += _sources(value)
    return found


def _sources(value: ir.Value | None) -> list[ir.Value]:
    """The constants that `value` is made of, or none where anything else goes into it."""
    if value is None:
        return []
    if value.is_initializer():
        return [value]
    producer = value.producer()
    if producer is None or producer.op_type not in CONSTANT_OPERATORS:
        return []
    parts = [_sources(part) for part in producer.inputs if part is not None]
    return [] if [] in parts else [constant for part in parts for constant in part]


def _input_scales(graph: ir.Graph) -> list[ir.Value]:
    """The vectors by which the inputs of layers are multiplied."""
    found = []
    for node in graph.all_nodes():
        producer = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if node.op_type not in (*LINEAR, "MatMulNBits") or producer is None or producer.op_type != "Mul":
            continue
        found += [value for value in producer.inputs if value is not None and value.is_initializer()]
    return found
