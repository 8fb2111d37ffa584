# SPDX-License-Identifier: Apache-2.0
"""Between which numbers the elements of a value lie, as far as the graph says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitfold.passes.values import constant

__all__ = ["COMPUTED", "Interval", "Unbounded", "interval"]

COMPUTED = 1e30
"""What layers compute is taken to be smaller: a model whose activations are larger is about to overflow."""


@dataclass(frozen=True)
class Interval:
    """All elements lie between `low` and `high`; none is NaN."""

    low: float
    high: float

    @property
    def finite(self) -> bool:
        """Whether no element is an infinity."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high))


@dataclass(frozen=True)
class Unbounded:
    """Nothing is known, and why."""

    reason: str


_ACTIVATIONS = {
    "Attention", "AveragePool", "Conv", "ConvTranspose", "Einsum", "Elu", "FastGelu", "FusedMatMul", "GRU",
    "Gelu", "Gemm", "GlobalAveragePool", "GroupNormalization", "InstanceNormalization", "LSTM",
    "LayerNormalization", "LeakyRelu", "MatMul", "MatMulIntegerToFloat", "MatMulNBits", "Mish",
    "MultiHeadAttention", "PRelu", "QuickGelu", "RMSNormalization", "RNN", "ReduceMean", "Relu", "Selu",
    "SimplifiedLayerNormalization", "SkipLayerNormalization", "Softplus",
}  # fmt: skip
"""Operators that compute activations of finite inputs."""
_BETWEEN: Mapping[str, Interval] = {
    **dict.fromkeys(("HardSigmoid", "Sigmoid", "Softmax"), Interval(0, 1)),
    **dict.fromkeys(("Cos", "Erf", "Sign", "Sin", "Softsign", "Tanh"), Interval(-1, 1)),
}
_MOVING = {
    "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Slice",
    "Split", "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze",
}  # fmt: skip
"""Operators that only move elements, or put zeros in their place."""
_MANY = 64
"""Operators that are followed back from one value."""


def interval(value: ir.Value | None, known: dict[ir.Value, Interval | Unbounded]) -> Interval | Unbounded:
    """Return an interval that holds all elements of a float32 value, or what hides them.

    Sums and products of constants are followed exactly, with float32 rounding; what layers compute of finite
    inputs is taken to be below `COMPUTED`. So a mask of -3.4e38 keeps its scores finite, and the sum of two
    such masks does not.

    Args:
        value: float, or of any other type that is cast.
        known: results, kept by the caller for other values of the same graph.
    """
    if value is None:
        return Unbounded("an operand is missing")
    if value not in known:
        known[value] = Unbounded(f"'{value.name}' depends on itself")
        known[value] = _look(value, known)
    return known[value]


def _look(value: ir.Value, known: dict[ir.Value, Interval | Unbounded]) -> Interval | Unbounded:
    tensor = constant(value)
    if tensor is not None:
        return _of_constant(value, tensor)
    if value.dtype is ir.DataType.BOOL:
        return Interval(0, 1)
    if value.dtype is not None and value.dtype.is_integer():
        return Interval(-(2.0**64), 2.0**64)
    node = value.producer()
    if node is None:
        return Unbounded(f"input '{value.name}' may hold an infinity")
    if value.dtype is not ir.DataType.FLOAT:
        return Unbounded(f"'{value.name}' is {value.dtype}, not FLOAT")
    if node.op_type in _BETWEEN:
        return _BETWEEN[node.op_type]
    operands = [operand for operand in node.inputs if operand is not None]
    if node.op_type in _ACTIVATIONS:
        return _activation(operands, known)
    if node.op_type in _MOVING:
        moved = operands if node.op_type == "Concat" else operands[:1]
        return _union([interval(operand, known) for operand in moved], zero=node.op_type == "Trilu")
    if node.op_type == "Where":
        return _union([interval(operand, known) for operand in node.inputs[1:]])
    if node.op_type == "Div" and _divides_by_zero(interval(operands[1], known)):
        return Unbounded(f"what '{value.name}' is divided by may be zero")
    if node.op_type in _ARITHMETIC:
        return _arithmetic(_ARITHMETIC[node.op_type], [interval(operand, known) for operand in operands])
    return Unbounded(f"{node.op_type} may give an infinity or NaN")


def _of_constant(value: ir.Value, tensor: ir.TensorProtocol) -> Interval | Unbounded:
    array = tensor.numpy()
    if not array.size:
        return Interval(0, 0)
    if np.isnan(array).any():
        return Unbounded(f"constant '{value.name}' holds NaN")
    return Interval(float(array.min()), float(array.max()))


def _activation(
    operands: Sequence[ir.Value], known: dict[ir.Value, Interval | Unbounded]
) -> Interval | Unbounded:
    """Return the interval of what a layer computes: finite where all that it reads is."""
    for operand in operands:
        found = interval(operand, known)
        if isinstance(found, Unbounded) and operand.producer() is not None:
            return found
        if isinstance(found, Interval) and not found.finite:
            return Unbounded(f"'{operand.name}' may hold an infinity")
    return Interval(-COMPUTED, COMPUTED)


def _divides_by_zero(divisor: Interval | Unbounded) -> bool:
    return isinstance(divisor, Interval) and divisor.low <= 0 <= divisor.high


def _union(found: Sequence[Interval | Unbounded], zero: bool = False) -> Interval | Unbounded:
    for item in found:
        if isinstance(item, Unbounded):
            return item
    known = [item for item in found if isinstance(item, Interval)]
    if zero:
        known.append(Interval(0, 0))
    return Interval(min(item.low for item in known), max(item.high for item in known))


_Rule = Callable[[Sequence[float]], float]


def _single(rule: Callable[[np.float32, np.float32], np.float32]) -> _Rule:
    """Return a rule over any number of operands, in float32."""

    def fold(numbers: Sequence[float]) -> float:
        total = np.float32(numbers[0])
        for number in numbers[1:]:
            total = rule(total, np.float32(number))
        return float(total)

    return fold


_ARITHMETIC: Mapping[str, _Rule] = {
    "Add": _single(lambda a, b: a + b),
    "Cast": _single(lambda a, b: a),
    "Div": _single(lambda a, b: a / b),
    "Max": _single(max),
    "Min": _single(min),
    "Mul": _single(lambda a, b: a * b),
    "Neg": lambda numbers: -numbers[0],
    "Sub": _single(lambda a, b: a - b),
    "Sum": _single(lambda a, b: a + b),
}
"""Operators that are monotonic in each operand: their extremes are at the corners."""


def _arithmetic(rule: _Rule, found: Sequence[Interval | Unbounded]) -> Interval | Unbounded:
    """Return the extremes over all corners of the operands' intervals."""
    union = _union(found)
    if isinstance(union, Unbounded):
        return union
    known = [item for item in found if isinstance(item, Interval)]
    corners: list[list[float]] = [[]]
    for item in known:
        corners = [[*corner, end] for corner in corners for end in (item.low, item.high)][:_MANY]
    with np.errstate(over="ignore", invalid="ignore"):
        numbers = [rule(corner) for corner in corners]
    if any(np.isnan(numbers)):
        return Unbounded("the sum or product of infinities may be NaN")
    return Interval(min(numbers), max(numbers))
