# SPDX-License-Identifier: Apache-2.0
"""Products of one input with several constant weights as one product."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.identity import display_layer
from splitfold.passes.joined_weights import mark_joined
from splitfold.passes.opset import default_opset
from splitfold.passes.projections import Form, Projection, projection_of
from splitfold.passes.provenance import mark_new
from splitfold.passes.values import add_initializer, drop_unused, emit, replace_value

__all__ = ["MergeProjectionsPass"]

_SPLIT_INPUT = 13
"""Opset from which the sizes of a Split are an input."""


@dataclass(frozen=True)
class MergeProjectionsPass(LayerPass):
    """Write MatMuls (or Gemms) of one input with constant weights as one MatMul of the weights side by side,
    and a Split: queries, keys and values of an attention, or gate and up of a gated feed-forward block.

    Takes float weights and what the quantizing passes write, dequantized, integer, dynamic and in blocks, as
    their scales go by column. Integer results are the same bit for bit. No preset does it: whether it is
    faster depends on the kernel and the number of rows, so measure it (``splitfold bench``).

    Before::

        q = MatMul(x, Wq) + bq
        k = MatMul(x, Wk) + bk

    After::

        q, k = Split(MatMul(x, [Wq Wk]) + [bq bk])
    """

    name: ClassVar[str] = "merge-projections"
    contract: ClassVar[Contract] = Contract.EXACT
    takes: ClassVar[str] = "MatMul and Gemm with constant weights, in float or quantized, of one input"

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        found = [item for node in model.graph.all_nodes() if (item := projection_of(node)) is not None]
        self.check_patterns(display_layer(item.node) for item in found)
        for group in _groups(found):
            kept = []
            for item in group:
                reason = self.unwanted(display_layer(item.node)) or _obstacle(model)
                if reason is None:
                    kept.append(item)
                else:
                    findings.skip(display_layer(item.node), reason)
            if len(kept) > 1:
                _merge(kept, findings)
        return bool(findings.applied)


def _groups(found: Sequence[Projection]) -> list[list[Projection]]:
    groups: dict[Hashable, list[Projection]] = {}
    for item in found:
        groups.setdefault((item.node.graph, item.key), []).append(item)
    return [group for group in groups.values() if len(group) > 1]


def _obstacle(model: ir.Model) -> str | None:
    opset = default_opset(model)
    return None if opset >= _SPLIT_INPUT else f"opset {opset} has no Split by computed sizes (13 has)"


def _merge(group: Sequence[Projection], findings: Findings) -> None:
    """Put one product in the place of all of `group`."""
    first, graph = group[0], group[0].node.graph
    if graph is None:
        raise ValueError(f"{first.node.name} is in no graph")
    base = "_".join(item.output.name or "" for item in group)
    joined = _WRITERS[first.form](group, _operands(group, graph, base), base)
    made = first.node
    sizes = add_initializer(graph, f"{base}_sizes", np.array([item.columns for item in group], np.int64))
    parts = emit(
        made,
        "Split",
        [joined, sizes],
        attributes={"axis": -1},
        names=[f"{item.output.name}_part" for item in group],
        origins=[item.node for item in group],
    ).producer()
    if parts is None:
        raise ValueError(f"{base}: nothing was emitted")
    for part, item in zip(parts.outputs, group, strict=True):
        part.type, part.shape = item.output.type, item.output.shape
        mark_new(part)
        findings.apply(display_layer(item.node), f"one {first.form.value} of {len(group)}")
        replace_value(item.output, part)
    for item in group:
        drop_unused(item.gone)


@dataclass(frozen=True)
class _Operands:
    """What the joined product reads: `pieces` as those of a projection, and a bias."""

    pieces: tuple[ir.Value | None, ...]
    bias: ir.Value | None


def _operands(group: Sequence[Projection], graph: ir.Graph, base: str) -> _Operands:
    """Add the joined constants: absent biases are zeros where others have one."""
    axis = 0 if group[0].form is Form.BLOCKS else -1
    home = group[0].weight.graph or graph
    pieces: list[ir.Value | None] = []
    for index, found in enumerate(zip(*(item.pieces for item in group), strict=True)):
        arrays = [array for array in found if array is not None]
        name = f"{base}_{_PIECES[index]}"
        pieces.append(add_initializer(home, name, np.concatenate(arrays, axis)) if arrays else None)
    weight = pieces[0]
    if weight is not None:
        mark_joined(weight, [item.weight for item in group])
    biases = [item.bias for item in group]
    kinds = [bias.dtype for bias in biases if bias is not None]
    if not kinds:
        return _Operands(tuple(pieces), None)
    rows = [
        np.zeros(item.columns, kinds[0]) if bias is None else bias
        for item, bias in zip(group, biases, strict=True)
    ]
    return _Operands(tuple(pieces), add_initializer(home, f"{base}_bias", np.concatenate(rows)))


_PIECES = ("weight", "scales", "zero_points")


def _emit(
    group: Sequence[Projection],
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    attributes: Mapping[str, object] | None = None,
) -> ir.Value:
    """Emit a node before the first of `group`, in the domain of its product where it is the same operator."""
    first = group[0].node
    domain = first.domain if op_type == first.op_type else ""
    value = emit(
        first,
        op_type,
        inputs,
        domain=domain,
        attributes=attributes,
        names=[name],
        origins=[node for item in group for node in item.gone],
    )
    value.type, value.shape = group[0].output.type, _shape(group)
    return value


def _shape(group: Sequence[Projection]) -> ir.Shape | None:
    """Return the shape of the joined result, where that of each is known."""
    shape = group[0].output.shape
    return None if shape is None else ir.Shape([*shape[:-1], sum(item.columns for item in group)])


def _float(group: Sequence[Projection], operands: _Operands, base: str) -> ir.Value:
    product = _emit(group, "MatMul", [group[0].node.inputs[0], operands.pieces[0]], f"{base}_joined")
    return _biased(group, product, operands, base)


def _biased(group: Sequence[Projection], value: ir.Value, operands: _Operands, base: str) -> ir.Value:
    return value if operands.bias is None else _emit(group, "Add", [value, operands.bias], f"{base}_biased")


def _gemm(group: Sequence[Projection], operands: _Operands, base: str) -> ir.Value:
    rest = [] if operands.bias is None else [operands.bias]
    return _emit(group, "Gemm", [group[0].node.inputs[0], operands.pieces[0], *rest], f"{base}_joined")


def _dequantized(group: Sequence[Projection], operands: _Operands, base: str) -> ir.Value:
    dequantize = group[0].gone[-1]
    block = dequantize.attributes.get("block_size")
    attributes: dict[str, object] = {"axis": 0 if block is not None and block.as_int() else 1}
    weight = emit(
        group[0].node,
        "DequantizeLinear",
        [value for value in operands.pieces if value is not None],
        domain=dequantize.domain,
        attributes={**dequantize.attributes, **attributes},
        names=[f"{base}_dequantized"],
        origins=[item.gone[-1] for item in group],
        dtype=dequantize.outputs[0].dtype,
    )
    product = _emit(group, "MatMul", [group[0].node.inputs[0], weight], f"{base}_joined")
    return _biased(group, product, operands, base)


def _integer(group: Sequence[Projection], operands: _Operands, base: str) -> ir.Value:
    data, _, scale, *rest = group[0].node.inputs
    codes, scales, zeros = operands.pieces
    inputs = [data, codes, scale, scales, rest[1] if len(rest) > 1 else None, zeros, operands.bias]
    return _emit(group, "MatMulIntegerToFloat", inputs, f"{base}_joined")


def _dynamic(group: Sequence[Projection], operands: _Operands, base: str) -> ir.Value:
    first = group[0]
    codes, scales, zeros = operands.pieces
    step, cast = first.gone[-1], next(node for node in first.gone if node.op_type == "Cast")
    scale = next(value for value in step.inputs if value is not None and not value.is_initializer())
    zero = first.node.inputs[2] if len(first.node.inputs) > 2 else None
    whole = _emit(group, "MatMulInteger", [first.node.inputs[0], codes, zero, zeros], f"{base}_sum")
    whole.type = ir.TensorType(ir.DataType.INT32)
    real = _emit(group, "Cast", [whole], f"{base}_cast", dict(cast.attributes))
    steps = _emit(group, "Mul", [scale, scales], f"{base}_step")
    steps.shape = None if scales is None else scales.shape
    return _biased(group, _emit(group, "Mul", [real, steps], f"{base}_product"), operands, base)


def _blocks(group: Sequence[Projection], operands: _Operands, base: str) -> ir.Value:
    attributes = {**group[0].node.attributes, "N": sum(item.columns for item in group)}
    inputs = [group[0].node.inputs[0], *(value for value in operands.pieces if value is not None)]
    product = _emit(group, "MatMulNBits", inputs, f"{base}_joined", attributes)
    return _biased(group, product, operands, base)


_WRITERS: Mapping[Form, Callable[[Sequence[Projection], _Operands, str], ir.Value]] = {
    Form.FLOAT: _float,
    Form.GEMM: _gemm,
    Form.DEQUANTIZED: _dequantized,
    Form.INTEGER: _integer,
    Form.DYNAMIC: _dynamic,
    Form.BLOCKS: _blocks,
}
