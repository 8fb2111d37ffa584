# SPDX-License-Identifier: Apache-2.0
"""Effective bits: what a model's weights take as stored, how many levels they really use, and how many bits
their codes are worth.

A weight that is split over parallel layers has one code in each; its joint code is what counts, as is the sum
of what all of them take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitfold.passes.affine import unpack_codes
from splitfold.passes.branches import covers_again
from splitfold.passes.identity import display_layer
from splitfold.passes.values import constant, int_attribute, sole_consumer
from splitfold.runtime.feeds import Array

__all__ = ["EffectiveBits", "effective_bits", "entropy"]

_INTEGER = {"MatMulInteger": (None, 3), "ConvInteger": (None, 3), "MatMulIntegerToFloat": (3, 5)}
"""Positions of the weight's scales and zero points."""
_LAYERS = {"MatMul": 1, "Gemm": 1, "Conv": 1, "Gather": 0}
"""Position of the weight."""


@dataclass(frozen=True)
class EffectiveBits:
    """How one layer's weight is held.

    Attributes:
        layer: user-facing name.
        weights: how many weights it has; those of parallel parts count once.
        stored: bits a weight: codes, scales, zero points and padding of all its parts.
        levels: mean number of distinct codes that the weights of a group (those that share a scale) take.
        entropy: bits a weight of its codes' empirical distribution over the layer, zero points taken off:
            what an entropy coder could store them in, scales aside.
    """

    layer: str
    weights: int
    stored: float
    levels: float
    entropy: float


def entropy(codes: Array) -> float:
    """Return the empirical entropy of `codes` (integers) in bits."""
    counts = np.unique(codes, return_counts=True)[1].astype(np.float64)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


@dataclass(frozen=True, eq=False)
class _Held:
    """The weight of one operator: centred codes [n, k], weights of a row in a group, bytes by initializer."""

    node: ir.Node
    codes: Array
    group: int
    sizes: dict[str, int]

    @property
    def overlays(self) -> bool:
        return covers_again(self.node)


def effective_bits(model: ir.Model) -> list[EffectiveBits]:
    """Return the effective bits of each layer whose weight is held in codes, in the order of the model.

    Float weights are left out. Linear layers, convolutions and tables count; recurrent layers do not.
    """
    layers: dict[str, list[_Held]] = {}
    for graph in model.graphs():
        for node in graph:
            if (held := _held(node)) is not None:
                layers.setdefault(display_layer(node), []).append(held)
    return [_effective(name, found) for name, found in layers.items()]


def _effective(layer: str, found: Sequence[_Held]) -> EffectiveBits:
    sizes: dict[str, int] = {}
    for held in found:
        sizes |= held.sizes
    planes = list(_planes(found))
    weights = sum(held.codes.size for held in found if not held.overlays)
    levels = [_distinct(codes, group) for codes, group in planes]
    joint = np.concatenate([codes.reshape(-1) for codes, _ in planes])
    return EffectiveBits(
        layer=layer,
        weights=weights,
        stored=8 * sum(sizes.values()) / weights,
        levels=float(np.concatenate(levels).mean()),
        entropy=entropy(joint),
    )


def _planes(found: Sequence[_Held]) -> Iterator[tuple[Array, int]]:
    """Yield codes [n, k] and group sizes; the codes of parallel parts are joined to one number a weight."""
    at = 0
    while at < len(found):
        codes, group = found[at].codes.astype(np.int64), found[at].group
        at += 1
        while at < len(found) and found[at].overlays and found[at].codes.shape == codes.shape:
            codes, group = codes * 1024 + found[at].codes, min(group, found[at].group)
            at += 1
        yield codes, group


def _distinct(codes: Array, group: int) -> Array:
    """Return how many distinct codes each group of each row has."""
    starts = range(0, codes.shape[1], group)
    counts = []
    for start in starts:
        ordered = np.sort(codes[:, start : start + group], axis=1)
        counts.append(1 + np.count_nonzero(np.diff(ordered, axis=1), axis=1))
    return np.concatenate(counts)


def _held(node: ir.Node) -> _Held | None:
    if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
        return _blocks(node)
    if node.op_type in _INTEGER:
        scale, zero = _INTEGER[node.op_type]
        return _integer(node, scale, zero)
    if node.op_type not in _LAYERS or len(node.inputs) <= _LAYERS[node.op_type]:
        return None
    weight = node.inputs[_LAYERS[node.op_type]]
    maker = weight.producer() if weight is not None else None
    if maker is not None and maker.op_type == "DequantizeLinear":
        return _dequantized(node, maker)
    if weight is not None and constant(weight) is not None and node.op_type == "Gather":
        return _table(node, weight)
    return _decoded(node, weight) if maker is not None else None


def _sizes(*values: ir.Value | None) -> dict[str, int]:
    tensors = {value.name or "": constant(value) for value in values if value is not None}
    return {name: int(tensor.nbytes) for name, tensor in tensors.items() if tensor is not None}


def _input(node: ir.Node, position: int | None) -> ir.Value | None:
    return node.inputs[position] if position is not None and position < len(node.inputs) else None


def _matrix(node: ir.Node, codes: Array) -> Array:
    """Return the codes of a weight as [n, k], output channels first."""
    if node.op_type in ("Conv", "ConvInteger", "Gather"):
        return codes.reshape(len(codes), -1)
    return codes if int_attribute(node, "transB", 0) else codes.T


def _blocks(node: ir.Node) -> _Held | None:
    linear = node.op_type == "MatMulNBits"
    packed, scales, zeros = (_input(node, at) for at in ((1, 2, 3) if linear else (0, 2, 3)))
    codes, steps, points = constant(packed), constant(scales), constant(zeros)
    if codes is None or steps is None or codes.dtype is not ir.DataType.UINT8:
        return None
    bits, block = int_attribute(node, "bits", 4), int_attribute(node, "block_size", 32)
    rows = int_attribute(node, "N", 0) if linear else int(steps.shape.numpy()[0])
    count = steps.size // rows
    columns = int_attribute(node, "K", 0) if linear else count * block
    stored = unpack_codes(codes.numpy().reshape(rows, count, -1), bits, block).astype(np.int64)
    if points is None or points.dtype is not ir.DataType.UINT8:
        centre = np.full((rows, count), 2 ** (bits - 1))
    else:
        centre = unpack_codes(points.numpy().reshape(rows, -1), bits, count)
    centred = (stored - centre[..., None]).reshape(rows, -1)[:, :columns]
    return _Held(node, centred, block, _sizes(packed, scales, zeros))


def _integer(node: ir.Node, scale: int | None, zero: int) -> _Held | None:
    weight, zeros = _input(node, 1), _input(node, zero)
    tensor, points = constant(weight), constant(zeros)
    if tensor is None or (zeros is not None and points is None):
        return None
    codes = tensor.numpy().astype(np.int64)
    if points is not None and points.numpy().any():
        codes = codes - points.numpy().astype(np.int64)
    matrix = _matrix(node, codes)
    steps = _input(node, scale) if scale is not None else _late_scale(node)
    return _Held(node, matrix, matrix.shape[1], _sizes(weight, steps, zeros))


def _late_scale(node: ir.Node) -> ir.Value | None:
    """Return the constant scales that integer results are multiplied by after a Cast, or None."""
    cast = sole_consumer(node.outputs[0])
    product = sole_consumer(cast.outputs[0]) if cast is not None and cast.op_type == "Cast" else None
    for value in product.inputs if product is not None else ():
        maker = value.producer() if value is not None else None
        operands = maker.inputs if maker is not None and maker.op_type == "Mul" else [value]
        if found := next((operand for operand in operands if constant(operand) is not None), None):
            return found
    return None


def _dequantized(node: ir.Node, maker: ir.Node) -> _Held | None:
    weight, scales, zeros = (_input(maker, at) for at in range(3))
    tensor, points = constant(weight), constant(zeros)
    if tensor is None or len(tensor.shape) < 2 or tensor.dtype.is_floating_point():
        return None
    codes = tensor.numpy().astype(np.int64)
    block, axis = int_attribute(maker, "block_size", 0), int_attribute(maker, "axis", 1)
    if points is not None:
        centre = points.numpy().astype(np.int64)
        if block:
            centre = np.repeat(centre, block, axis).take(range(codes.shape[axis]), axis)
        elif centre.size > 1:
            centre = centre.reshape([-1 if at == axis % codes.ndim else 1 for at in range(codes.ndim)])
        codes = codes - centre
    matrix = _matrix(node, codes)
    return _Held(node, matrix, block or matrix.shape[1], _sizes(weight, scales, zeros))


def _table(node: ir.Node, weight: ir.Value) -> _Held | None:
    """Return an int8 table whose rows are scaled after the Gather; the scales are gathered like a table."""
    tensor = constant(weight)
    if tensor is None or tensor.dtype is not ir.DataType.INT8 or len(tensor.shape) != 2:
        return None
    scales = _late_gathered(node)
    matrix = tensor.numpy().astype(np.int64)
    return _Held(node, matrix, matrix.shape[1], _sizes(weight, scales))


def _late_gathered(node: ir.Node) -> ir.Value | None:
    cast = sole_consumer(node.outputs[0])
    product = sole_consumer(cast.outputs[0]) if cast is not None and cast.op_type == "Cast" else None
    for value in product.inputs if product is not None else ():
        maker = value.producer() if value is not None else None
        if maker is not None and maker.op_type == "Gather" and maker.inputs[1] is node.inputs[1]:
            return maker.inputs[0]
    return None


def _decoded(node: ir.Node, weight: ir.Value | None) -> _Held | None:
    """Return a weight that the model looks up in tables by part and group, as quantize-parts writes it."""
    if weight is None or weight.shape is None or not all(isinstance(dim, int) for dim in weight.shape):
        return None
    above = list(_above(weight))
    lookup = next((it for it in above if it.op_type == "GatherElements"), None)
    stored = _first_constant(lookup.inputs[1]) if lookup is not None else None
    tensor = constant(stored)
    if tensor is None or tensor.dtype.is_floating_point():
        return None
    dims = [int(dim) for dim in weight.shape if isinstance(dim, int)]
    rows = dims[-1] if node.op_type in ("MatMul", "Gemm") else dims[0]
    matrix = tensor.numpy().astype(np.int64).reshape(rows, -1)[:, : math.prod(dims) // rows]
    group = min(int(tensor.shape.numpy()[-1]), matrix.shape[1])
    return _Held(node, matrix, group, _sizes(*(value for it in above for value in it.inputs)))


def _above(value: ir.Value) -> Iterator[ir.Node]:
    """Yield the nodes that `value` is made by, nearest first."""
    pending, seen = [value], set[ir.Node]()
    while pending:
        maker = pending.pop(0).producer()
        if maker is not None and maker not in seen:
            seen.add(maker)
            yield maker
            pending.extend(operand for operand in maker.inputs if operand is not None)


def _first_constant(value: ir.Value | None) -> ir.Value | None:
    while value is not None and constant(value) is None:
        maker = value.producer()
        value = maker.inputs[0] if maker is not None and maker.inputs else None
    return value
