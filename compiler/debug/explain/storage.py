# SPDX-License-Identifier: Apache-2.0
"""How a layer holds its weight: codes, scales, zero points, padding and bias, to the byte, and the grid of
its activations."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitfold.compiler.inspection import LayerFacts, weighted_nodes
from splitfold.passes.branches import branch_of_node, covers_again
from splitfold.passes.values import int_attribute, sole_consumer

__all__ = ["Grid", "Storage", "stored_weights"]


class _Role(enum.Enum):
    CODES = "codes"
    SCALES = "scales"
    ZEROS = "zero points"
    BIAS = "bias"


_C, _S, _Z, _B = _Role.CODES, _Role.SCALES, _Role.ZEROS, _Role.BIAS
_ROLES: dict[str, dict[int, _Role]] = {
    "ConvInteger": {1: _C, 3: _Z},
    "DynamicQuantizeMatMul": {1: _C, 2: _S, 3: _Z, 4: _B},
    "GRU": {1: _C, 2: _C, 3: _B},
    "Gather": {0: _C},
    "GatherBlockQuantized": {0: _C, 2: _S, 3: _Z},
    "LSTM": {1: _C, 2: _C, 3: _B},
    "MatMul": {0: _C, 1: _C},
    "MatMulInteger": {1: _C, 3: _Z},
    "MatMulIntegerToFloat": {1: _C, 3: _S, 5: _Z, 6: _B},
    "MatMulNBits": {1: _C, 2: _S, 3: _Z, 5: _B},
    "QGemm": {3: _C, 4: _S, 5: _Z, 6: _B},
    "QLinearConv": {3: _C, 4: _S, 5: _Z, 8: _B},
    "QLinearMatMul": {3: _C, 4: _S, 5: _Z},
    "RNN": {1: _C, 2: _C, 3: _B},
}
"""What the inputs of an operator hold, by position."""
_USUAL = {1: _C, 2: _B}
_ACTIVATION = {
    "MatMulIntegerToFloat": (2, 4),
    "QLinearConv": (1, 2),
    "QLinearMatMul": (1, 2),
    "QGemm": (1, 2),
}
"""Positions of the activation's scale and zero point."""

_Part = tuple[_Role, str, ir.TensorProtocol]


@dataclass(frozen=True)
class Grid:
    """A per-tensor grid of activations: x = (code - zero point) * scale."""

    scale: float
    zero_point: int


@dataclass(frozen=True)
class Storage:
    """The weight of one operator as stored.

    Attributes:
        node: the operator.
        precision: what it is held in, and the activations where they are quantized.
        weight: name of the initializer of the codes.
        elements: number of weights.
        codes, scales, zero_points: bytes of each; `codes` holds `padding`.
        padding: bytes of codes that hold no weight: an incomplete last block, an incomplete last byte.
        bias: bytes of the bias and of its own scales.
        block: weights that share a scale along an axis, or None: one scale a channel, a row or the tensor.
        scale_count: number of scales.
        scale_range: smallest and largest magnitude of the scales, or None for floats.
        activation: the static grid of its input, or None: float, or a range that each run finds itself.
        low_bit: whether the weight is held in integers.
        branch: which branch of a layer that is written as several it is, such as "part 2 of 3"; else empty.
        counted: whether its weights are not counted already: those of parallel parts are the same ones.
    """

    node: ir.Node
    precision: str
    weight: str
    elements: int
    codes: int
    scales: int
    zero_points: int
    padding: int
    bias: int
    block: int | None
    scale_count: int
    scale_range: tuple[float, float] | None
    activation: Grid | None
    low_bit: bool
    branch: str = ""
    counted: bool = True

    @property
    def bits(self) -> float:
        """Stored bits a weight: codes, scales, zero points and padding; the bias is not counted."""
        return 8 * (self.codes + self.scales + self.zero_points) / self.elements


def stored_weights(model: ir.Model) -> list[Storage]:
    """Return how each operator with weights holds them, in order; `model` is given layer names where it has
    none."""
    found = [(node, facts, list(_parts(node))) for node, facts in weighted_nodes(model)]
    scales = {name for _, _, parts in found for role, name, _ in parts if role is not _C}
    kept = [(node, facts, parts) for node, facts, parts in found if any(_own(part, scales) for part in parts)]
    return [_storage(node, facts, parts) for node, facts, parts in kept]


def _own(part: _Part, scales: set[str]) -> bool:
    """Whether the part is a weight, not another layer's scales (those of a table are gathered like one)."""
    role, name, tensor = part
    return role is _C and name not in scales and len(tensor.shape) > 1


def _parts(node: ir.Node) -> Iterator[_Part]:
    """Yield (role, name, tensor) of each constant that the layer holds, the Add of its bias included."""
    roles = _ROLES.get(node.op_type, _USUAL)
    for position, role in roles.items():
        if position < len(node.inputs):
            yield from _constants(node.inputs[position], role)
    last = node
    if node.op_type in ("Gather", "MatMulInteger"):
        last, scales = _scaled(node)
        yield from scales
    if node.op_type != "Gather":
        yield from _following_bias(last)


def _constants(value: ir.Value | None, role: _Role) -> Iterator[_Part]:
    """Yield the constants that `value` is made from, through DequantizeLinear and what moves a weight."""
    if value is None:
        return
    tensor = ir.convenience.get_const_tensor(value)
    producer = value.producer()
    if tensor is not None:
        yield role, value.name or "", tensor
    elif producer is not None and producer.op_type == "DequantizeLinear":
        bias = role is _B
        inner = (role, _B, _B) if bias else (role, _S, _Z)
        codes = list(_constants(producer.inputs[0], role))
        if codes:  # else it is an activation
            yield from codes
            for operand, part in zip(producer.inputs[1:], inner[1:], strict=False):
                yield from _constants(operand, part)
    elif producer is not None and producer.op_type == "GatherElements":  # codes looked up in tables
        yield from _constants(producer.inputs[1], role)
        yield from _table(producer.inputs[0])
    elif producer is not None and producer.op_type in ("Cast", "Identity", "Reshape", "Slice", "Transpose"):
        yield from _constants(producer.inputs[0], role)


def _table(value: ir.Value | None) -> Iterator[_Part]:
    """Yield the constants of a table (levels - zero points) * scales."""
    product = value.producer() if value is not None else None
    while product is not None and product.op_type == "Reshape":
        value = product.inputs[0]
        product = value.producer() if value is not None else None
    if product is None or product.op_type != "Mul":
        return
    yield from _constants(product.inputs[1], _S)
    centred = product.inputs[0].producer() if product.inputs[0] is not None else None
    if centred is not None and centred.op_type == "Sub":
        yield from _constants(centred.inputs[1], _Z)


def _scaled(node: ir.Node) -> tuple[ir.Node, list[_Part]]:
    """Return the Mul that scales integer results, after a Cast, and the constants of its scales."""
    cast = sole_consumer(node.outputs[0])
    product = sole_consumer(cast.outputs[0]) if cast is not None and cast.op_type == "Cast" else None
    if cast is None or product is None or product.op_type != "Mul":
        return node, []
    step = product.inputs[1] if product.inputs[0] is cast.outputs[0] else product.inputs[0]
    producer = step.producer() if step is not None else None
    reads = (step,) if producer is None else producer.inputs
    return product, [part for value in reads for part in _constants(value, _S) if _is_float(part)]


def _is_float(part: _Part) -> bool:
    return part[2].dtype.is_floating_point()


def _following_bias(last: ir.Node) -> Iterator[_Part]:
    add = sole_consumer(last.outputs[0])
    if add is not None and add.op_type == "Add" and add.domain == "":
        for value in add.inputs:
            tensor = ir.convenience.get_const_tensor(value) if value is not None else None
            if value is not None and tensor is not None and len(tensor.shape) == 1:
                yield _B, value.name or "", tensor


def _storage(node: ir.Node, facts: LayerFacts, parts: list[_Part]) -> Storage:
    codes = [(name, tensor) for role, name, tensor in parts if role is _C and len(tensor.shape) > 1]
    name, weight = max(codes, key=lambda item: item[1].size)
    elements = _elements(node, sum(tensor.size for _, tensor in codes))
    stored = sum(tensor.nbytes for _, tensor in codes)
    scales = [tensor for role, _, tensor in parts if role is _S]
    low_bit = not weight.dtype.is_floating_point()
    return Storage(
        node=node,
        precision=facts.precision,
        weight=name,
        elements=elements,
        codes=stored,
        scales=_bytes(parts, _S),
        zero_points=_bytes(parts, _Z),
        padding=stored - -(-elements * _bits(node, weight) // 8),
        bias=_bytes(parts, _B),
        block=_block(node),
        scale_count=sum(tensor.size for tensor in scales),
        scale_range=_range(scales) if low_bit else None,
        activation=_activation(node),
        low_bit=low_bit,
        branch=", ".join(str(mark) for mark in branch_of_node(node)),
        counted=not covers_again(node),
    )


def _bytes(parts: list[_Part], role: _Role) -> int:
    return sum({name: tensor.nbytes for found, name, tensor in parts if found is role}.values())


def _bits(node: ir.Node, weight: ir.TensorProtocol) -> int:
    if node.op_type in ("GatherBlockQuantized", "MatMulNBits"):
        return int_attribute(node, "bits", 4)
    return weight.dtype.bitwidth


def _elements(node: ir.Node, size: int) -> int:
    """Return the number of weights: packed codes hold several in a byte."""
    if node.op_type == "MatMulNBits":
        return int_attribute(node, "K", 0) * int_attribute(node, "N", 0)
    return size * 8 // int_attribute(node, "bits", 4) if node.op_type == "GatherBlockQuantized" else size


def _block(node: ir.Node) -> int | None:
    made = [value.producer() for value in node.inputs if value is not None]
    holders = [node, *(maker for maker in made if maker is not None and maker.op_type == "DequantizeLinear")]
    blocks = [int_attribute(holder, "block_size", 0) for holder in holders]
    return max(blocks) or None


def _range(scales: list[ir.TensorProtocol]) -> tuple[float, float] | None:
    values = [np.abs(tensor.numpy().astype(np.float64)).reshape(-1) for tensor in scales if tensor.size]
    if not values:
        return None
    joined = np.concatenate(values)
    return float(joined.min()), float(joined.max())


def _activation(node: ir.Node) -> Grid | None:
    if node.op_type in _ACTIVATION:
        return _grid(node, *_ACTIVATION[node.op_type])
    maker = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    return _grid(maker, 1, 2) if maker is not None and maker.op_type == "DequantizeLinear" else None


def _grid(node: ir.Node, scale: int, zero: int) -> Grid | None:
    held = [_scalar(node, position) for position in (scale, zero)]
    return None if held[0] is None else Grid(float(held[0]), int(held[1] or 0))


def _scalar(node: ir.Node, position: int) -> float | None:
    value = node.inputs[position] if position < len(node.inputs) else None
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return float(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None
