# SPDX-License-Identifier: Apache-2.0
"""RepQ's scale reparameterisation: a grid for each channel of a norm's output, folded into the norm and the
next layers, so that one grid for the whole tensor gives the same codes.

Li et al., ICCV 2023, section 3.2: r = s / s~, b = s~ (z~ - z); gamma / r, beta / r - b, W diag(r), bias + W
b. A zero point of an ONNX grid is a whole number, so z~ is rounded here. The channels' own z are not: every
channel fills [-s~ z~, s~ (2^bits - 1 - z~)] exactly, and the min-max grid of the folded tensor is s~, z~. The
identity holds all the same: every code is the code of the channel's own grid, round(x / s + z).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitfold.passes.fold import fold
from splitfold.passes.foldable import ScaleGroup
from splitfold.passes.integer_linear import following_bias
from splitfold.passes.layers import Layer, LayerKind
from splitfold.passes.values import add_initializer, constant, drop_initializer, emit, rename, take_place
from splitfold.runtime.feeds import Array

__all__ = [
    "Reparameterisation",
    "apply_repq",
    "folded_range",
    "forget_range",
    "reparameterise",
    "repq_obstacle",
]

_LEAST = 1e-8
_RANGE = "splitfold.input-range"
"""Metadata key of a layer's node: the ends of the tensor's grid that the channels' grids became."""


@dataclass(frozen=True, eq=False)
class Reparameterisation:
    """Channel grids and the tensor grid that they become.

    Attributes:
        ratio: r = s / s~, float32 [channels], positive.
        shift: b = s~ (z~ - z), float32 [channels].
        scale: s~.
        zero_point: z~, an integer.
        bits: width of a code.
    """

    ratio: Array
    shift: Array
    scale: float
    zero_point: int
    bits: int

    @property
    def ends(self) -> tuple[float, float]:
        """The values of the lowest and of the highest code of the tensor's grid."""
        return -self.scale * self.zero_point, self.scale * (2**self.bits - 1 - self.zero_point)


def reparameterise(low: Array, high: Array, bits: int) -> Reparameterisation:
    """Return the reparameterisation of channels that span [low, high], [channels] each.

    A channel that is constant gets a scale of at least 1e-8 times the mean; every interval is widened to hold
    zero, as for any grid of ours. The zero points -low / s of the channels are fractional.
    """
    low, high = np.minimum(np.asarray(low, np.float64), 0), np.maximum(np.asarray(high, np.float64), 0)
    top = 2**bits - 1
    scales = (high - low) / top
    mean = float(scales.mean())
    scales = np.maximum(scales, _LEAST * mean if mean > 0 else 1.0)
    zeros = -low / scales
    scale, zero = float(scales.mean()), int(np.rint(zeros.mean()))
    ratio = (scales / scale).astype(np.float32)
    return Reparameterisation(ratio, (scale * (zero - zeros)).astype(np.float32), scale, zero, bits)


def repq_obstacle(group: ScaleGroup) -> str | None:
    """Return why a shift cannot be folded into what makes the group's input, or None: it takes a
    LayerNormalization with beta, read only by these layers."""
    if group.region is None:
        return group.obstacle
    norms = {item.node for item in group.region.parameters if item.divides}
    if len(norms) != 1 or (norm := next(iter(norms))).op_type != "LayerNormalization":
        return "its input is made by no LayerNormalization"
    if any(layer.input is not norm.outputs[0] for layer in group.readers):
        return "an operator stands between the norm and the layer"
    if len(norm.inputs) < 3 or norm.inputs[2] is None:
        return "the norm has no beta that could hold the shift"
    if not group.is_linear:
        return "a convolution pads with zeros, which the shift would move"
    return None


def apply_repq(model: ir.Model, group: ScaleGroup, found: Reparameterisation) -> None:
    """Fold ratio and shift into the norm and the layers, in place. Exact up to rounding.

    The ends of the tensor's grid are kept with the layers: where channels were clipped, calibration
    afterwards would find wider ones.
    """
    if group.region is None:
        raise ValueError(f"{group.name}: nothing absorbs the scale")
    norm = next(item.node for item in group.region.parameters if item.divides)
    fold(model, group.region, found.ratio)
    _shift_beta(norm, found.shift)
    for layer in group.readers:
        now = layer.current()
        _shift_bias(now, found.shift @ now.weight_array())
        layer.node.metadata_props[_RANGE] = ",".join(map(repr, found.ends))


def folded_range(node: ir.Node) -> tuple[float, float] | None:
    """Return the ends of the grid that the first input of a layer was folded for, or None."""
    text = node.metadata_props.get(_RANGE)
    if not text:
        return None
    low, _, high = text.partition(",")
    return float(low), float(high)


def forget_range(node: ir.Node) -> None:
    """Drop the ends of that grid: the input was scaled once more."""
    node.metadata_props.pop(_RANGE, None)


def _shift_beta(norm: ir.Node, shift: Array) -> None:
    """beta / r - b; the fold has divided already."""
    _replace_constant(norm, 2, -shift)


def _replace_constant(node: ir.Node, index: int, difference: Array) -> None:
    value, graph = node.inputs[index], node.graph
    tensor = constant(value)
    if value is None or tensor is None or graph is None:
        raise ValueError(f"{node.name}: parameter {index} is not constant")
    changed = (np.asarray(tensor.numpy(), np.float32) + difference).astype(np.float32)
    node.replace_input_with(index, add_initializer(graph, f"{value.name}_shifted", changed))
    drop_initializer(value)


def _shift_bias(layer: Layer, difference: Array) -> None:
    """Add W b to the layer's bias: its own, that of the Add behind it, or a new one."""
    if layer.kind is LayerKind.GEMM and layer.bias is not None:
        _replace_constant(layer.node, 2, difference)
        return
    add = following_bias(layer)
    if add is not None:
        _replace_constant(add, 1 if add.inputs[0] is layer.output else 0, difference)
        rename(layer.output, f"{layer.output.name}_before")
        return
    graph, output = layer.node.graph, layer.output
    if graph is None:
        raise ValueError(f"{layer.name} is in no graph")
    uses = [(use.node, use.idx) for use in output.uses()]
    bias = add_initializer(graph, f"{output.name}_shift", difference.astype(np.float32))
    shifted = emit(layer.node, "Add", [output, bias], names=[f"{output.name}_shifted"], like=output)
    made = [node for node in (shifted.producer(),) if node is not None]
    graph.remove(made)
    graph.insert_after(layer.node, made)
    for node, index in uses:
        node.replace_input_with(index, shifted)
    take_place(output, shifted)
