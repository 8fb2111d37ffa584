# SPDX-License-Identifier: Apache-2.0
"""Analysis: which linear layers share an input, and who can absorb a scale for each channel of that input."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitfold.passes.identity import display_layer
from splitfold.passes.layers import Layer, find_layers
from splitfold.passes.values import constant, int_attribute
from splitfold.runtime.feeds import Array

__all__ = ["ScaleGroup", "scale_groups"]


@dataclass(frozen=True, eq=False)
class ScaleGroup:
    """The linear layers that read one value, whose channels (last axis) can be scaled together.

    Attributes:
        value: the shared input.
        layers: its linear readers.
        norm: the LayerNormalization that computes it with constant gamma and beta, or None.
        obstacle: why `norm` cannot absorb the scale, which then costs an explicit Mul, or None: nobody but
            `layers` reads the value.
    """

    value: ir.Value
    layers: tuple[Layer, ...]
    norm: ir.Node | None
    obstacle: str | None

    @property
    def absorbed(self) -> bool:
        """Whether `norm` absorbs the scale."""
        return self.obstacle is None

    @property
    def name(self) -> str:
        """User-facing name of the group: its layers."""
        return "+".join(layer.name for layer in self.layers)

    def weight_peaks(self) -> Array:
        """Return the largest weight magnitude of each input channel over all layers, float32 [channels]."""
        peaks = [np.abs(layer.weight_array()).max(axis=1) for layer in self.layers]
        return np.asarray(np.max(peaks, axis=0), np.float32)

    def norm_peaks(self) -> Array | None:
        """Return an estimate of each channel's largest magnitude from the norm alone, |beta| + 3 |gamma|;
        None without a norm.

        A normalised element is rarely beyond three standard deviations.
        """
        if self.norm is None:
            return None
        gamma = np.abs(_parameter(self.norm, 1))
        beta = (
            np.abs(_parameter(self.norm, 2))
            if len(self.norm.inputs) > 2 and self.norm.inputs[2] is not None
            else 0.0
        )
        return np.asarray(beta + 3 * gamma, np.float32)


def _parameter(norm: ir.Node, index: int) -> Array:
    tensor = constant(norm.inputs[index])
    if tensor is None:
        raise ValueError(f"{norm.name}: parameter {index} is not constant")
    return np.asarray(tensor.numpy())


def scale_groups(model: ir.Model) -> list[ScaleGroup]:
    """Return the groups of the main graph, in order of execution; float32 layers only."""
    readers: dict[ir.Value, list[Layer]] = {}
    for layer in find_layers(model)[0]:
        if layer.is_linear and not layer.in_subgraph and layer.weight.dtype is ir.DataType.FLOAT:
            readers.setdefault(layer.input, []).append(layer)
    return [_group(value, layers) for value, layers in readers.items()]


def _group(value: ir.Value, layers: list[Layer]) -> ScaleGroup:
    norm = value.producer()
    if norm is None or norm.op_type != "LayerNormalization":
        made = "an input of the model" if norm is None else f"made by a {norm.op_type}"
        return ScaleGroup(value, tuple(layers), None, f"what it reads is {made}, not by a LayerNormalization")
    if not _is_plain_norm(norm):
        return ScaleGroup(
            value, tuple(layers), None, "the LayerNormalization is not over the last axis alone"
        )
    return ScaleGroup(value, tuple(layers), norm, _other_reader(value, layers))


def _is_plain_norm(node: ir.Node) -> bool:
    if int_attribute(node, "axis", -1) != -1:
        return False
    parameters = [value for value in node.inputs[1:] if value is not None]
    return all((tensor := constant(value)) is not None and len(tensor.shape) == 1 for value in parameters)


def _other_reader(value: ir.Value, layers: list[Layer]) -> str | None:
    nodes = {layer.node for layer in layers}
    others = [use.node for use in value.uses() if use.node not in nodes]
    if others:
        return f"the {others[0].op_type} of {display_layer(others[0])} reads the norm's output too, unscaled"
    return "the norm's output is an output of the model too" if value.is_graph_output() else None
