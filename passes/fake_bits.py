# SPDX-License-Identifier: Apache-2.0
"""Simulated bit widths: layers that compute in float what a grid of 2 to 8 bits would leave of their weights
and inputs, each layer with bits of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from splitfold.passes.bit_grid import BitGrid, bit_grid
from splitfold.passes.block_grid import BlockLayout
from splitfold.passes.clip_search import mse_grid
from splitfold.passes.gptq import Ranges
from splitfold.passes.layers import Layer
from splitfold.passes.ranges import ActivationStats, Calibrator, activation_range
from splitfold.passes.values import add_initializer, drop_initializer, emit
from splitfold.runtime.feeds import Array

__all__ = [
    "BITS",
    "FakeInputs",
    "LayerBits",
    "SeenGrids",
    "emit_round_trip",
    "fake_weight",
    "set_fake_weight",
    "simulate_layer",
    "simulate_operands",
    "simulated_bits",
    "weight_bits_stored",
]

BITS = range(2, 9)
"""The widths that can be simulated."""
_SIMULATED = "splitfold.simulated"
"""Metadata key of a node whose operands are simulated."""
_SCALE_BITS = 32


@dataclass(frozen=True)
class LayerBits:
    """The simulated widths of one layer; None leaves the operand in float.

    Raises:
        ValueError: a width is not 2 to 8.
    """

    weights: int | None
    activations: int | None

    def __post_init__(self) -> None:
        for name, bits in (("weights", self.weights), ("activations", self.activations)):
            if bits is not None and bits not in BITS:
                raise ValueError(f"{name} is {bits}; it may be 2 to 8, or none for float.")

    def __str__(self) -> str:
        return f"W{self.weights or 32}A{self.activations or 32}"


def fake_weight(layer: Layer, bits: int, ranges: Ranges = Ranges.WHOLE) -> Array:
    """Return the weight of `layer` after the round trip through an asymmetric grid for each output channel,
    float32 of its shape.

    Args:
        layer: MatMul, Gemm or Conv.
        bits: width of a code.
        ranges: a grid for the channel's whole range, or for the part of it with the least squared error.
    """
    weight = layer.weight_array()
    rows = np.moveaxis(weight, layer.channel_axis, 0)
    x = rows.reshape(len(rows), 1, -1).astype(np.float32)
    layout = BlockLayout(8, x.shape[-1], symmetric=False, levels=2**bits)
    grid = layout.grid(x) if ranges is Ranges.WHOLE else mse_grid(x, layout)
    return np.ascontiguousarray(np.moveaxis(grid.round_trip(x).reshape(rows.shape), 0, layer.channel_axis))


def weight_bits_stored(layer: Layer, bits: int) -> int:
    """Return the bits that the weight of `layer` would take: packed codes, and a float32 scale and a zero
    point for each output channel."""
    weight = layer.weight_array()
    return int(weight.size * bits + weight.shape[layer.channel_axis] * (_SCALE_BITS + bits))


def set_fake_weight(layer: Layer, bits: int, ranges: Ranges = Ranges.WHOLE) -> None:
    """Let `layer` read its weight after the round trip. Layers that share a weight and its bits share the
    result."""
    graph = layer.weight.graph or layer.node.graph
    if graph is None:
        raise ValueError(f"{layer.name} is in no graph")
    held = add_initializer(graph, f"{layer.weight.name}_{bits}bit", fake_weight(layer, bits, ranges))
    layer.node.replace_input_with(1, held)
    drop_initializer(layer.weight)


def emit_round_trip(value: ir.Value, grid: BitGrid, before: ir.Node) -> ir.Value:
    """Emit the round trip of `value` over `grid` before a node, whose layers it inherits, and return it.

    QuantizeLinear, DequantizeLinear and then, in float, a Clip to the ends of the grid, which are values of
    it: exact. The Clip has to be last. With a Clip of the codes between the two, ONNX Runtime (seen in
    1.31.1) takes DequantizeLinear, Conv or Gemm, QuantizeLinear in a chain for an int8 layer, and quantizes
    its float weight with one 8-bit scale. So the Clip is emitted for 8 bits too.
    """
    graph = before.graph
    if graph is None:
        raise ValueError(f"{before.name} is in no graph")
    base, low, high = f"{value.name}_{grid.bits}bit", *grid.ends
    scale = add_initializer(graph, f"{base}_scale", np.array(grid.scale))
    zero = add_initializer(graph, f"{base}_zero_point", np.array(grid.zero_point))
    ends = [
        add_initializer(graph, f"{base}_{name}", np.array(end))
        for name, end in (("low", low), ("high", high))
    ]
    codes = emit(
        before,
        "QuantizeLinear",
        [value, scale, zero],
        names=[f"{base}_codes"],
        like=value,
        dtype=ir.DataType.UINT8,
    )
    back = emit(before, "DequantizeLinear", [codes, scale, zero], names=[f"{base}_values"], like=value)
    return emit(before, "Clip", [back, *ends], names=[base], like=value)


@dataclass(frozen=True)
class SeenGrids:
    """Grids of values from what calibration saw of them.

    Args:
        stats: by value name, with histograms where the calibrator needs them.
        calibrator: which part of the seen range a grid covers.
        percentile: of that calibrator.
        folded: ends by value name of those that were folded for a grid, which is then theirs.
    """

    stats: Mapping[str, ActivationStats]
    calibrator: Calibrator = Calibrator.MINMAX
    percentile: float = 99.999
    folded: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __call__(self, value: ir.Value, bits: int) -> BitGrid:
        """Return the grid of `value` for codes of `bits` bits."""
        name = value.name or ""
        if name in self.folded:
            return bit_grid(*self.folded[name], bits)
        seen = self.stats[name]
        ends = activation_range(seen, self.calibrator, percentile=self.percentile, bits=bits)
        return bit_grid(*ends, bits)


@dataclass
class FakeInputs:
    """Round trips of activations, shared by the nodes that read one value with one width.

    Args:
        grid: returns the grid of a value for a width.
    """

    grid: Callable[[ir.Value, int], BitGrid]
    made: dict[tuple[ir.Value, int], ir.Value] = field(default_factory=dict)

    def set(self, node: ir.Node, index: int, bits: int) -> None:
        """Let input `index` of `node` be read after the round trip. Call it in the order of execution: the
        first reader's place is that of the round trip."""
        value = node.inputs[index]
        if value is None:
            raise ValueError(f"{node.name}: input {index} is missing")
        if (value, bits) not in self.made:
            self.made[value, bits] = emit_round_trip(value, self.grid(value, bits), node)
        node.replace_input_with(index, self.made[value, bits])


def simulate_layer(layer: Layer, bits: LayerBits, inputs: FakeInputs, ranges: Ranges = Ranges.WHOLE) -> None:
    """Let `layer` (a MatMul, Gemm or Conv) compute with its input and weight after their round trips. Call it
    in the order of execution."""
    if bits.activations is not None:
        inputs.set(layer.node, 0, bits.activations)
    if bits.weights is not None:
        set_fake_weight(layer, bits.weights, ranges)
    _mark(layer.node, bits)


def simulate_operands(node: ir.Node, bits: int, inputs: FakeInputs, count: int = 2) -> None:
    """Let the `count` first inputs of an operator between activations pass their round trips: both operands
    of a product or an addition, what a norm reads. Call it in the order of execution."""
    for index in range(count):
        inputs.set(node, index, bits)
    _mark(node, LayerBits(None, bits))


def _mark(node: ir.Node, bits: LayerBits) -> None:
    node.metadata_props[_SIMULATED] = str(bits)


def simulated_bits(node: ir.Node) -> str | None:
    """Return the simulated widths of `node` as text, such as ``W4A8``, or None."""
    return node.metadata_props.get(_SIMULATED)
