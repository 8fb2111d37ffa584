# SPDX-License-Identifier: Apache-2.0
"""The exact fold: constants of a scale region divided or multiplied by the scales."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from splitfold.passes.channels import FREE, Marks
from splitfold.passes.foldable import ScaleGroup
from splitfold.passes.scale_region import Parameter, Region
from splitfold.passes.scaled_tensor import scaled_tensor
from splitfold.passes.values import add_initializer, constant, drop_initializer, emit, rename
from splitfold.runtime.feeds import Array

__all__ = ["fold", "fold_group", "multiply_input"]


def fold(model: ir.Model, region: Region, scales: Array) -> None:
    """Divide the inputs of the region's readers by `scales` and multiply their weights, in place. Exact up to
    rounding.

    Args:
        model: holds the region.
        region: what takes part.
        scales: float [region.scales], positive and finite.

    Raises:
        ValueError: a scale is not positive and finite, or there are not `region.scales` of them.
    """
    scales = np.asarray(scales, np.float32)
    if scales.shape != (region.scales,):
        raise ValueError(f"{region.name}: {scales.shape} scales for {region.scales}")
    if not (np.isfinite(scales).all() and (scales > 0).all()):
        raise ValueError(f"{region.name}: scales must be positive and finite")
    made: dict[_Key, ir.Value] = {}
    for parameter in region.parameters:
        _scale(parameter, scales, made)
    for value in region.values:
        rename(value, f"{value.name}_scaled")


_Key = tuple[ir.Value, tuple[int, ...], bytes, bool]


def _scale(parameter: Parameter, scales: Array, made: dict[_Key, ir.Value]) -> None:
    """Scale one parameter; nodes that share it and its marks share the scaled one, kept in `made`."""
    value = parameter.node.inputs[parameter.index]
    tensor, graph = constant(value), parameter.node.graph
    if value is None or tensor is None or graph is None:
        raise ValueError(f"{parameter.node.name}: parameter {parameter.index} is not constant")
    key = (value, parameter.marks.shape, parameter.marks.tobytes(), parameter.divides)
    if key not in made:
        changed = scaled_tensor(tensor, _spread(parameter.marks, scales), divide=parameter.divides)
        made[key] = add_initializer(value.graph or graph, f"{value.name}_folded", changed)
    parameter.node.replace_input_with(parameter.index, made[key])
    drop_initializer(value)


def _spread(marks: Marks, scales: Array) -> Array:
    return np.where(marks == FREE, np.float32(1), scales[np.where(marks == FREE, 0, marks)])


def fold_group(model: ir.Model, group: ScaleGroup, scales: Array) -> None:
    """Apply the scales of a group: into its region, or by one Mul of the shared input. Exact up to rounding.

    Args:
        model: holds the group.
        group: what takes part.
        scales: float [group.scales], positive and finite.

    Raises:
        ValueError: a scale is not positive and finite, or their number is wrong.
    """
    if group.region is not None:
        fold(model, group.region, scales)
    else:
        multiply_input(group, scales)


def multiply_input(group: ScaleGroup, scales: Array) -> ir.Value:
    """Emit Mul(x, 1 / s) for the layers of `group`, which read one value, scale their weights by s, and
    return the scaled value."""
    first = group.layers[0]
    graph = first.node.graph
    if graph is None:
        raise ValueError(f"{group.name} is in no graph")
    value, factor = first.input, group.spread(first, scales)
    inverse = add_initializer(graph, f"{value.name}_inverse_scale", (1 / factor).astype(np.float32))
    inner = emit(first.node, "Mul", [value, inverse], names=[f"{value.name}_scaled_in"], like=value)
    if inner.shape is not None:
        inner.shape = ir.Shape([*inner.shape[:-1], factor.size])
    made: dict[ir.Value, ir.Value] = {}
    for layer in group.readers:
        tensor = constant(layer.weight)
        if tensor is None:
            raise ValueError(f"{layer.name}: the weight is not a constant")
        if layer.weight not in made:
            scaled = scaled_tensor(tensor, factor[:, None])
            made[layer.weight] = add_initializer(graph, f"{layer.weight.name}_folded", scaled)
        layer.node.replace_input_with(1, made[layer.weight])
        layer.node.replace_input_with(0, inner)
        drop_initializer(layer.weight)
    return inner
