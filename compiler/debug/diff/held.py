# SPDX-License-Identifier: Apache-2.0
"""The constants that a node computes with, as numbers: codes are turned back into what they stand for."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from splitfold.passes.affine import BlockQuantized, dequantize_blocks, unpack_codes
from splitfold.passes.values import constant, int_attribute, ints_attribute
from splitfold.runtime.feeds import Array

__all__ = ["Held", "Role", "held_by"]


class Role(enum.Enum):
    """What a constant is for its operator."""

    WEIGHT = "weight"
    BIAS = "bias"


@dataclass(frozen=True)
class Held:
    """A constant that a node reads, directly or in codes.

    Attributes:
        value: the stored initializer: the numbers themselves, or their codes.
        parts: the initializers that turn codes into numbers: scales and zero points.
        numbers: gives the numbers; a matrix of a linear layer is [in, out] however it is stored. It raises
            ValueError, IndexError or ZeroDivisionError where the operands do not fit the operator.
        channels: axes of input and output channels of a weight, -1 where there is none.
        form: how packed codes are to be read; empty where dtype and shape say it.
    """

    value: ir.Value
    parts: tuple[ir.Value, ...]
    numbers: Callable[[], Array]
    channels: tuple[int, int] = (-1, -1)
    form: str = ""


@dataclass(frozen=True)
class _Layout:
    """Which inputs hold a weight and its grid, and a bias: positions, -1 where there is none."""

    weight: int
    scale: int = -1
    zero: int = -1
    bias: int = -1
    bias_scales: tuple[int, ...] = ()
    channels: tuple[int, int] = (0, 1)


_LAYOUTS: Mapping[str, _Layout] = {
    "MatMul": _Layout(1),
    "FusedMatMul": _Layout(1),
    "Gemm": _Layout(1, bias=2),
    "FusedGemm": _Layout(1, bias=2),
    "Conv": _Layout(1, bias=2, channels=(1, 0)),
    "FusedConv": _Layout(1, bias=2, channels=(1, 0)),
    "ConvTranspose": _Layout(1, bias=2),
    "Gather": _Layout(0, channels=(-1, -1)),
    "MatMulIntegerToFloat": _Layout(1, 3, 5, 6),
    "DynamicQuantizeMatMul": _Layout(1, 2, 3, 4),
    "QLinearMatMul": _Layout(3, 4, 5),
    "QGemm": _Layout(3, 4, 5, 6, (1, 4)),
    "QLinearConv": _Layout(3, 4, 5, 8, (1, 4), channels=(1, 0)),
    "MatMulInteger": _Layout(1, zero=3),
    "ConvInteger": _Layout(1, zero=3, channels=(1, 0)),
}
_TRANSPOSABLE = ("Gemm", "FusedGemm", "QGemm", "FusedMatMul")
_LATE_SCALE = ("MatMulInteger", "ConvInteger", "Gather")
"""Operators on codes whose scale is multiplied in after them."""


def held_by(node: ir.Node, *, fused: bool = False) -> dict[Role | int, Held]:
    """Return the constants of a node by role, or by the position of the input where they have none; what is
    added in a group that is `fused` elsewhere is its bias."""
    found: dict[Role | int, Held] = {}
    if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
        blocks = _blocks(node)
        return {Role.WEIGHT: blocks} if blocks is not None else {}
    layout = _LAYOUTS.get(node.op_type)
    own = set() if layout is None else {layout.weight, layout.bias, layout.scale, layout.zero}
    if layout is not None:
        own |= set(layout.bias_scales)
        found |= dict(_operands(node, layout))
    for position, value in enumerate(node.inputs):
        held = _plain(value)
        if position not in own and held is not None:
            found[Role.BIAS if fused and node.op_type == "Add" else position] = held
    return found


def _operands(node: ir.Node, layout: _Layout) -> Iterator[tuple[Role, Held]]:
    weight = _weight(node, layout)
    if weight is not None:
        yield Role.WEIGHT, replace(weight, channels=_channels(node, weight, layout))
    bias = _input(node, layout.bias)
    found = _plain(bias)
    if found is not None and layout.bias_scales and _is_codes(bias):
        found = _coded_bias(found, [_input(node, at) for at in layout.bias_scales])
    if found is not None:
        yield Role.BIAS, found


def _weight(node: ir.Node, layout: _Layout) -> Held | None:
    value = _input(node, layout.weight)
    scale, zero = _input(node, layout.scale), _input(node, layout.zero)
    late = node.op_type in _LATE_SCALE and scale is None and _is_codes(value)
    if late:
        scale, zero = _late_grid(node, zero)
    turned = node.op_type in _TRANSPOSABLE and int_attribute(node, "transB", 0) == 1
    if scale is None:
        held = _plain(value)
    else:
        axis = layout.channels[1] if not turned else 0
        held = _affine(value, scale, zero, axis, flat=late and node.op_type != "Gather")
    return _turned(held, (1, 0)) if turned and held is not None else held


def _turned(held: Held, axes: tuple[int, ...] | None) -> Held:
    return replace(held, numbers=lambda: np.transpose(held.numbers(), axes))


def _input(node: ir.Node, position: int) -> ir.Value | None:
    return node.inputs[position] if 0 <= position < len(node.inputs) else None


def _channels(node: ir.Node, held: Held, layout: _Layout) -> tuple[int, int]:
    grouped = int_attribute(node, "group", 1) > 1
    known = held.value.shape is not None and len(held.value.shape) > 1
    return (-1, layout.channels[1]) if grouped else layout.channels if known else (-1, -1)


def _is_codes(value: ir.Value | None) -> bool:
    tensor = constant(value)
    return tensor is not None and not tensor.dtype.is_floating_point()


def _plain(value: ir.Value | None) -> Held | None:
    """Return a constant as it reaches its reader: through DequantizeLinear, Transpose, Cast and Identity."""
    tensor = constant(value)
    if value is None:
        return None
    if tensor is not None:
        return Held(value, (), tensor.numpy)
    maker = value.producer()
    if maker is None or not maker.inputs:
        return None
    if maker.op_type == "DequantizeLinear":
        return _dequantized(maker)
    inner = _plain(maker.inputs[0]) if maker.op_type in ("Transpose", "Cast", "Identity") else None
    if inner is None or maker.op_type != "Transpose":
        return inner
    return _turned(inner, ints_attribute(maker, "perm"))


def _dequantized(node: ir.Node) -> Held | None:
    axis, block = int_attribute(node, "axis", 1), int_attribute(node, "block_size", 0)
    return _affine(node.inputs[0], _input(node, 1), _input(node, 2), axis, block=block or 1)


def _affine(
    codes: ir.Value | None,
    scale: ir.Value | None,
    zero: ir.Value | None,
    axis: int,
    *,
    block: int = 1,
    flat: bool = False,
) -> Held | None:
    """Return codes with scale and zero point of one element, one a channel of `axis`, or one a `block` along
    it; `flat` ones are of one a channel whatever their shape is."""
    held, steps, points = constant(codes), constant(scale), constant(zero)
    if (
        codes is None
        or held is None
        or scale is None
        or steps is None
        or (zero is not None and points is None)
    ):
        return None

    def spread(tensor: ir.TensorProtocol) -> Array:
        grid = tensor.numpy().astype(np.float32)
        return _spread(grid.reshape(-1) if flat else grid, tuple(held.shape.numpy()), axis, block)

    def numbers() -> Array:
        origin = spread(points) if points is not None else 0
        return np.asarray((held.numpy().astype(np.float32) - origin) * spread(steps), np.float32)

    return Held(codes, (scale, zero) if zero is not None else (scale,), numbers)


def _spread(grid: Array, shape: tuple[int, ...], axis: int, block: int) -> Array:
    if grid.size == 1:
        return grid.reshape(())
    if grid.ndim == len(shape) > 1:
        return np.repeat(grid, block, axis).take(range(shape[axis]), axis) if block > 1 else grid
    return grid.reshape([-1 if at == axis % len(shape) else 1 for at in range(len(shape))])


def _late_grid(node: ir.Node, zero: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """Return the constant scale and zero point that turn the result of codes into numbers: those of a
    DequantizeLinear, or the scale that it is multiplied by after a Cast: alone, with the activations' scale,
    or looked up by the same indices."""
    readers = [use.node for use in node.outputs[0].uses()]
    for reader in readers:
        if reader.op_type == "DequantizeLinear" and zero is None:
            return _input(reader, 1), _input(reader, 2)
    casts = [reader for reader in readers if reader.op_type == "Cast"]
    for product in (
        use.node for cast in casts for use in cast.outputs[0].uses() if use.node.op_type == "Mul"
    ):
        for value in product.inputs:
            if found := _scale_of(node, value):
                return found, zero
    return None, zero


def _scale_of(node: ir.Node, value: ir.Value | None) -> ir.Value | None:
    if constant(value) is not None:
        return value
    maker = value.producer() if value is not None else None
    if maker is None:
        return None
    if node.op_type == "Gather":
        same = maker.op_type == "Gather" and maker.inputs[1] is node.inputs[1]
        return maker.inputs[0] if same and constant(maker.inputs[0]) is not None else None
    if maker.op_type == "Mul":
        return next((operand for operand in maker.inputs if constant(operand) is not None), None)
    return None


def _coded_bias(held: Held, steps: list[ir.Value | None]) -> Held | None:
    tensors = [constant(step) for step in steps]
    if any(tensor is None for tensor in tensors):
        return None

    def numbers() -> Array:
        whole = held.numbers().astype(np.float32)
        for tensor in tensors:
            if tensor is not None:
                whole = whole * tensor.numpy().astype(np.float32).reshape(-1)
        return whole

    return Held(held.value, (), numbers)


def _blocks(node: ir.Node) -> Held | None:
    """Return the weight of a MatMulNBits as [in, out], or the table of a GatherBlockQuantized."""
    linear = node.op_type == "MatMulNBits"
    positions = (1, 2, 3) if linear else (0, 2, 3)
    packed, scales, zeros = (_input(node, at) for at in positions)
    codes, steps, points = constant(packed), constant(scales), constant(zeros)
    if packed is None or scales is None or codes is None or steps is None:
        return None
    if zeros is not None and (points is None or points.dtype.is_floating_point()):
        return None  # zero points of their own kind
    if linear and _input(node, 4) is not None:
        return None  # blocks in an order of their own
    bits, block = int_attribute(node, "bits", 4), int_attribute(node, "block_size", 32 if linear else 128)
    if codes.dtype is not ir.DataType.UINT8:
        return _affine(packed, scales, zeros, int_attribute(node, "quantize_axis", 1), block=block)

    def numbers() -> Array:
        grid = steps.numpy()
        rows = int_attribute(node, "N", 0) if linear else grid.shape[0]
        count = grid.size // rows
        columns = int_attribute(node, "K", 0) if linear else count * block
        stored = unpack_codes(codes.numpy().view(np.uint8).reshape(rows, count, -1), bits, block)
        origin = None if points is None else unpack_codes(points.numpy().reshape(rows, -1), bits, count)
        table = BlockQuantized(stored, grid.reshape(rows, count).astype(np.float32), origin, bits, columns)
        found = dequantize_blocks(table)
        return found.T if linear else found

    parts = (scales, zeros) if zeros is not None else (scales,)
    return Held(packed, parts, numbers, (0, 1) if linear else (-1, -1), f"{bits} bits, blocks of {block}")
