# SPDX-License-Identifier: Apache-2.0
"""Shapes of outputs from those of inputs, by operator, with symbolic sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import onnx_ir as ir

from splitfold.passes.dims import ONE, Dim, Shape, product
from splitfold.passes.small_contents import Contents, Item
from splitfold.passes.values import int_attribute, ints_attribute

__all__ = ["Known", "axes_of", "output_shape"]

_TO_THE_END = 2**31 - 1
"""What exporters write as the end of a Slice up to the last element, or more."""


class Known(Protocol):
    """What the rules ask of what is known so far."""

    def of(self, value: ir.Value | None) -> Shape | None:
        """Return the shape of `value`, or None where its rank is unknown."""

    def content(self, value: ir.Value | None) -> Contents | None:
        """Return the elements of a small tensor of rank 0 or 1, or None."""


_Rule = Callable[[ir.Node, Known, int], Shape | None]


def output_shape(node: ir.Node, known: Known, position: int) -> Shape | None:
    """Return the shape of output `position` of `node`, or None where there is no rule, or too little is known
    of its inputs."""
    rule = (_RULES if node.domain in ("", "ai.onnx") else _CONTRIB).get(node.op_type)
    return rule(node, known, position) if rule is not None else None


def _same(node: ir.Node, known: Known, _: int) -> Shape | None:
    return known.of(node.inputs[0])


def _broadcast_shapes(left: Shape, right: Shape) -> Shape:
    rank = max(len(left), len(right))
    left = (ONE,) * (rank - len(left)) + left
    right = (ONE,) * (rank - len(right)) + right
    return tuple(_broadcast(a, b) for a, b in zip(left, right, strict=True))


def _broadcast(a: Dim | None, b: Dim | None) -> Dim | None:
    if a in (ONE, b):
        return b
    if b == ONE:
        return a
    if b is not None and (a is None or b.known is not None):
        return b
    return a


def _broadcast_all(node: ir.Node, known: Known, _: int) -> Shape | None:
    total: Shape = ()
    for value in node.inputs:
        shape = known.of(value)
        if shape is None:
            return None
        total = _broadcast_shapes(total, shape)
    return total


def _reshape(node: ir.Node, known: Known, _: int) -> Shape | None:
    source, target = known.of(node.inputs[0]), known.content(node.inputs[1])
    if target is None:
        rank = known.of(node.inputs[1])
        return (None,) * rank[0].known if rank and rank[0] is not None and rank[0].known else None
    keeps_zero = int_attribute(node, "allowzero", 0) == 0
    dims: list[Dim | None] = []
    for axis, item in enumerate(target):
        if item == Dim(0) and keeps_zero:
            dims.append(source[axis] if source is not None and axis < len(source) else None)
        else:
            dims.append(item if isinstance(item, Dim) else None)
    if Dim(-1) not in dims:
        return tuple(dims)
    at = dims.index(Dim(-1))
    dims[at] = None
    total = product(source) if source is not None else None
    rest = product(dims[:at] + dims[at + 1 :])
    if total is not None and rest is not None:
        dims[at] = total.over(rest)
    return tuple(dims)


def _transpose(node: ir.Node, known: Known, _: int) -> Shape | None:
    shape = known.of(node.inputs[0])
    if shape is None:
        return None
    perm = ints_attribute(node, "perm") or tuple(reversed(range(len(shape))))
    return tuple(shape[axis] for axis in perm)


def axes_of(node: ir.Node, known: Known) -> tuple[int, ...] | None:
    """Return the axes of a Squeeze, Unsqueeze or reduction, from its second input or its attribute."""
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        content = known.content(node.inputs[1])
        if content is None:
            return None
        axes = [item.known for item in content if isinstance(item, Dim)]
        return None if None in axes else tuple(axis for axis in axes if axis is not None)
    return ints_attribute(node, "axes")


def _unsqueeze(node: ir.Node, known: Known, _: int) -> Shape | None:
    shape, axes = known.of(node.inputs[0]), axes_of(node, known)
    if shape is None or axes is None:
        return None
    rank = len(shape) + len(axes)
    places = {axis % rank for axis in axes}
    rest = iter(shape)
    return tuple(ONE if axis in places else next(rest) for axis in range(rank))


def _squeeze(node: ir.Node, known: Known, _: int) -> Shape | None:
    shape, axes = known.of(node.inputs[0]), axes_of(node, known)
    if shape is None:
        return None
    if axes is None:
        return tuple(dim for dim in shape if dim != ONE)
    places = {axis % len(shape) for axis in axes}
    return tuple(dim for axis, dim in enumerate(shape) if axis not in places)


def _expand(node: ir.Node, known: Known, _: int) -> Shape | None:
    shape, target = known.of(node.inputs[0]), known.content(node.inputs[1])
    if shape is None or target is None:
        return None
    wanted = tuple(item if isinstance(item, Dim) else None for item in target)
    return _broadcast_shapes(shape, wanted)


def _tile(node: ir.Node, known: Known, _: int) -> Shape | None:
    shape, repeats = known.of(node.inputs[0]), known.content(node.inputs[1])
    if shape is None or repeats is None or len(repeats) != len(shape):
        return None
    return tuple(
        dim * times if dim is not None and isinstance(times, Dim) else None
        for dim, times in zip(shape, repeats, strict=True)
    )


def _matmul(node: ir.Node, known: Known, _: int) -> Shape | None:
    left, right = known.of(node.inputs[0]), known.of(node.inputs[1])
    if left is None or right is None or len(left) < 2 or len(right) < 2:
        return None
    return (*_broadcast_shapes(left[:-2], right[:-2]), left[-2], right[-1])


def _fused_matmul(node: ir.Node, known: Known, _: int) -> Shape | None:
    left, right = known.of(node.inputs[0]), known.of(node.inputs[1])
    if left is None or right is None or len(left) < 2 or len(right) < 2:
        return None
    rows = left[-1 if int_attribute(node, "transA", 0) else -2]
    columns = right[-2 if int_attribute(node, "transB", 0) else -1]
    return (*_broadcast_shapes(left[:-2], right[:-2]), rows, columns)


def _blocked_matmul(node: ir.Node, known: Known, _: int) -> Shape | None:
    shape = known.of(node.inputs[0])
    return None if shape is None else (*shape[:-1], Dim(int_attribute(node, "N", 0)))


def _quantized_matmul(node: ir.Node, known: Known, _: int) -> Shape | None:
    left, right = known.of(node.inputs[0]), known.of(node.inputs[3])
    if left is None or right is None or len(left) < 2 or len(right) < 2:
        return None
    return (*_broadcast_shapes(left[:-2], right[:-2]), left[-2], right[-1])


def _heads(node: ir.Node, known: Known, position: int) -> Shape | None:
    """Of attention with separate queries, keys and values: as queries, but as wide as values."""
    query = known.of(node.inputs[0])
    value = known.of(node.inputs[2]) if len(node.inputs) > 2 else None
    if position or query is None or len(query) != 3 or value is None or len(value) != 3:
        return None
    return (*query[:2], value[2])


def _packed_heads(node: ir.Node, known: Known, position: int) -> Shape | None:
    """Of attention that holds its projections in one weight."""
    data, weight, sizes = (
        known.of(node.inputs[0]),
        known.of(node.inputs[1]),
        ints_attribute(node, "qkv_hidden_sizes"),
    )
    if position or data is None or len(data) != 3 or weight is None or weight[-1] is None:
        return None
    return (*data[:2], Dim(sizes[2]) if sizes else weight[-1].over(Dim(3)))


def _skip_norm(node: ir.Node, known: Known, position: int) -> Shape | None:
    return known.of(node.inputs[0]) if position in (0, 3) else None


def _gemm(node: ir.Node, known: Known, _: int) -> Shape | None:
    left, right = known.of(node.inputs[0]), known.of(node.inputs[1])
    if left is None or right is None or len(left) != 2 or len(right) != 2:
        return None
    rows = left[1 if int_attribute(node, "transA", 0) else 0]
    return (rows, right[0 if int_attribute(node, "transB", 0) else 1])


def _concat(node: ir.Node, known: Known, _: int) -> Shape | None:
    parts = [part for value in node.inputs if (part := known.of(value)) is not None]
    if len(parts) != len(node.inputs) or len({len(part) for part in parts}) != 1:
        return None
    axis = int_attribute(node, "axis", 0) % len(parts[0])
    shape = list(parts[0])
    for part in parts[1:]:
        shape = [a if a is not None else b for a, b in zip(shape, part, strict=True)]
    shape[axis] = _sum([part[axis] for part in parts])
    return tuple(shape)


def _sum(dims: list[Dim | None]) -> Dim | None:
    found = [dim for dim in dims if dim is not None]
    if len(found) != len(dims):
        return None
    if len({dim.symbols for dim in found}) == 1:
        return Dim(sum(dim.factor for dim in found), found[0].symbols)
    return Dim(1, (f"({'+'.join(map(str, found))})",))


def _gather(node: ir.Node, known: Known, _: int) -> Shape | None:
    data, indices = known.of(node.inputs[0]), known.of(node.inputs[1])
    if data is None or indices is None or not data:
        return None
    axis = int_attribute(node, "axis", 0) % len(data)
    return (*data[:axis], *indices, *data[axis + 1 :])


def _split(node: ir.Node, known: Known, position: int) -> Shape | None:
    shape = known.of(node.inputs[0])
    if shape is None:
        return None
    axis = int_attribute(node, "axis", 0) % len(shape)
    sizes = known.content(node.inputs[1]) if len(node.inputs) > 1 else None
    if sizes is not None and position < len(sizes):
        item = sizes[position]
        size = item if isinstance(item, Dim) else None
    else:
        whole = shape[axis]
        size = whole.over(Dim(len(node.outputs))) if whole is not None else None
    return (*shape[:axis], size, *shape[axis + 1 :])


def _slice(node: ir.Node, known: Known, _: int) -> Shape | None:
    shape = known.of(node.inputs[0])
    if shape is None:
        return None
    given = [known.content(value) for value in node.inputs[1:]]
    starts, ends = given[0], given[1] if len(given) > 1 else None
    if starts is None and ends is None:
        return None
    count = len(starts if starts is not None else ends or ())
    axes = given[2] if len(given) > 2 and given[2] is not None else tuple(Dim(i) for i in range(count))
    steps = given[3] if len(given) > 3 and given[3] is not None else (ONE,) * count
    dims = list(shape)
    for at, item in enumerate(axes):
        if not isinstance(item, Dim) or item.known is None:
            return None
        axis = item.known % len(shape)
        start, end = starts[at] if starts else None, ends[at] if ends else None
        dims[axis] = _sliced(dims[axis], start, end, steps[at])
    return tuple(dims)


def _sliced(size: Dim | None, start: Item, end: Item, step: Item) -> Dim | None:
    if not isinstance(start, Dim) or not isinstance(end, Dim) or not isinstance(step, Dim):
        return None
    if start == Dim(0) and step == ONE and end == size:
        return size
    if (
        size is not None
        and start == Dim(0)
        and step == ONE
        and end.known is not None
        and end.known >= _TO_THE_END
    ):
        return size
    if None in (start.known, end.known, step.known):
        if start == Dim(0) and step == ONE and end.known is None:
            return end
        if size is not None and (end.known or 0) >= _TO_THE_END:
            half = size.over(Dim(2))
            return half if half == start and step == ONE else None
        return None
    if size is None or size.known is None:
        return end if start == Dim(0) and step == ONE and 0 <= (end.known or 0) < _TO_THE_END else None
    return Dim(len(range(size.known)[slice(start.known, end.known, step.known)]))


def _constant_of_shape(node: ir.Node, known: Known, _: int) -> Shape | None:
    target = known.content(node.inputs[0])
    return None if target is None else tuple(item if isinstance(item, Dim) else None for item in target)


def _reduce(node: ir.Node, known: Known, _: int) -> Shape | None:
    shape, axes = known.of(node.inputs[0]), axes_of(node, known)
    if shape is None or axes is None:
        return None
    places = {axis % len(shape) for axis in axes}
    if int_attribute(node, "keepdims", 1):
        return tuple(ONE if axis in places else dim for axis, dim in enumerate(shape))
    return tuple(dim for axis, dim in enumerate(shape) if axis not in places)


def _range(node: ir.Node, known: Known, _: int) -> Shape | None:
    given = [known.content(value) for value in node.inputs]
    if given[0] != (Dim(0),) or given[2] != (ONE,) or not given[1]:
        return (None,)
    limit = given[1][0]
    return (limit if isinstance(limit, Dim) else None,)


_SAME = (
    "Abs", "Cast", "Ceil", "Clip", "Cos", "DequantizeLinear", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu",
    "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LayerNormalization", "LeakyRelu", "Log", "Neg",
    "Not", "QuantizeLinear", "RMSNormalization", "Reciprocal", "Relu", "RotaryEmbedding", "Round", "Sigmoid",
    "Sign", "SimplifiedLayerNormalization", "Sin", "Softmax", "Softplus", "Sqrt", "Swish", "Tanh", "Trilu",
)  # fmt: skip
_BROADCAST = (
    "Add", "And", "BitwiseAnd", "BitwiseOr", "Div", "Equal", "Greater", "GreaterOrEqual", "Less",
    "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "Pow", "Sub", "Sum", "Where", "Xor",
)  # fmt: skip
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_BROADCAST, _broadcast_all),
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Gather": _gather,
    "Gemm": _gemm,
    **dict.fromkeys(("MatMul", "MatMulInteger"), _matmul),
    "QLinearMatMul": _quantized_matmul,
    "Range": _range,
    **dict.fromkeys(("ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"), _reduce),
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
_CONTRIB: dict[str, _Rule] = {
    **dict.fromkeys(("BiasAdd", "BiasGelu", "FastGelu", "Gelu", "GroupQueryAttention", "QuickGelu"), _same),
    **dict.fromkeys(("DynamicQuantizeMatMul", "MatMulIntegerToFloat"), _matmul),
    **dict.fromkeys(("DequantizeLinear", "QuantizeLinear", "RotaryEmbedding"), _same),
    **dict.fromkeys(("Attention", "QAttention"), _packed_heads),
    **dict.fromkeys(("DecoderMaskedMultiHeadAttention", "MultiHeadAttention"), _heads),
    "FusedMatMul": _fused_matmul,
    "MatMulNBits": _blocked_matmul,
    **dict.fromkeys(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), _skip_norm),
}
"""Operators of the runtime."""
