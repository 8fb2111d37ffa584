# SPDX-License-Identifier: Apache-2.0
"""How a weight of parts is carried: as one float weight, or as codes that the runtime decodes when it opens
the model."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from splitfold.passes.layers import Layer
from splitfold.passes.part_codes import PartCodes
from splitfold.passes.split_weight import weight_of
from splitfold.passes.values import add_initializer, emit
from splitfold.runtime.feeds import Array

__all__ = ["carry_codes", "carry_float"]


def carry_float(layer: Layer, codes: PartCodes) -> ir.Value:
    """Return the weight that the codes stand for, as an initializer."""
    return add_initializer(_graph(layer), f"{layer.weight.name}_rounded", _weight(layer, codes))


def _weight(layer: Layer, codes: PartCodes) -> Array:
    kind = layer.weight_array().dtype
    return weight_of(layer, codes.values().astype(kind))


def _graph(layer: Layer) -> ir.Graph:
    if layer.node.graph is None:
        raise ValueError(f"{layer.name} is in no graph")
    return layer.node.graph


def carry_codes(layer: Layer, codes: PartCodes) -> ir.Value:
    """Emit the decoding of the codes before `layer`, and return the float32 weight.

    Everything it reads is constant, so the runtime folds it once: the file holds codes, the memory floats.
    table = (level - zero) * scale by group and part; weight = table[code].
    """
    graph, at, name = _graph(layer), layer.node, layer.weight.name

    def held(what: str, array: Array | ir.TensorProtocol) -> ir.Value:
        return add_initializer(graph, f"{name}_{what}", array)

    def step(
        op: str, inputs: list[ir.Value | None], what: str, dtype: ir.DataType, **attributes: object
    ) -> ir.Value:
        return emit(at, op, inputs, attributes=attributes, names=[f"{name}_{what}"], dtype=dtype)

    whole, real = ir.DataType.INT64, ir.DataType.FLOAT
    rows, groups, _ = codes.codes.shape
    stored = held("codes", _typed(codes))
    if codes.code_bits == 4:  # the runtime casts 4 bits to bytes only
        stored = step("Cast", [stored], "bytes", ir.DataType.UINT8, to=ir.DataType.UINT8.value)
    indices = step("Cast", [stored], "indices", whole, to=whole.value)
    zeros = step("Cast", [held("zeros", codes.zeros[..., None])], "zero_points", real, to=real.value)
    scales = held("scales", codes.scales[..., None])
    if codes.scales.dtype != np.float32:
        scales = step("Cast", [scales], "steps", real, to=real.value)
    levels = held("levels", np.arange(codes.levels, dtype=np.float32))
    centred = step("Sub", [levels, zeros], "centred", real)
    values = step("Mul", [centred, scales], "values", real)
    table_shape = held("table_shape", np.array([rows, groups, codes.parts * codes.levels], np.int64))
    table = step("Reshape", [values, table_shape], "table", real)
    weight = _shaped(layer, codes, step("GatherElements", [table, indices], "decoded", real, axis=2))
    weight.shape = layer.weight.shape
    return weight


def _typed(codes: PartCodes) -> Array | ir.TensorProtocol:
    if codes.code_bits == 4:
        return ir.tensor(codes.codes.astype(ir.DataType.UINT4.numpy()), dtype=ir.DataType.UINT4)
    return codes.codes


def _shaped(layer: Layer, codes: PartCodes, decoded: ir.Value) -> ir.Value:
    """Emit what brings the groups into the shape of the weight."""
    graph, at, name = _graph(layer), layer.node, layer.weight.name
    n, k = codes.shape

    def step(op: str, inputs: list[ir.Value | None], what: str, **attributes: object) -> ir.Value:
        names = [f"{name}_{what}"]
        return emit(at, op, inputs, attributes=attributes, names=names, dtype=ir.DataType.FLOAT)

    def numbers(what: str, values: list[int]) -> ir.Value:
        return add_initializer(graph, f"{name}_{what}", np.array(values, np.int64))

    padded = codes.codes.size // n
    matrix = step("Reshape", [decoded, numbers("matrix_shape", [n, padded])], "matrix")
    if padded > k:
        bounds = [numbers("start", [0]), numbers("end", [k]), numbers("axis", [1])]
        matrix = step("Slice", [matrix, *bounds], "cut")
    if layer.is_linear:
        return step("Transpose", [matrix], "weight", perm=[1, 0])
    shape = layer.weight_array().shape
    return matrix if len(shape) == 2 else step("Reshape", [matrix, numbers("shape", list(shape))], "weight")
