# SPDX-License-Identifier: Apache-2.0
"""Analysis: which linear layers share scales for their input channels, and what can absorb these scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitfold.passes.channels import FREE, Marks, NotEquivariantError
from splitfold.passes.layers import Layer, LayerKind, find_layers
from splitfold.passes.scale_region import Region, grow_region
from splitfold.passes.values import constant, int_attribute
from splitfold.runtime.feeds import Array

__all__ = ["ScaleGroup", "scale_groups"]


@dataclass(frozen=True, eq=False)
class ScaleGroup:
    """Layers whose input channels are scaled together.

    Attributes:
        readers: by layer, the scale of each of its input channels: int64 [channels], `FREE` is 1.
        scales: how many scales there are.
        region: the constants that absorb them, or None.
        obstacle: where there is no region: why; the scale then costs an explicit Mul of the shared input.
    """

    readers: Mapping[Layer, Marks]
    scales: int
    region: Region | None
    obstacle: str = ""

    @property
    def name(self) -> str:
        """User-facing name of the group: its layers."""
        return "+".join(dict.fromkeys(layer.name for layer in self.readers))

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, in order of execution."""
        return tuple(self.readers)

    @property
    def is_linear(self) -> bool:
        """Whether all layers are MatMul or Gemm."""
        return all(layer.is_linear for layer in self.readers)

    def pooled(self, peaks: Mapping[Layer, Array]) -> Array:
        """Return, for each scale, the largest of `peaks` over all channels that take it: float32 [scales].

        Args:
            peaks: one number for each input channel of each layer, not negative.
        """
        found = np.zeros(self.scales, np.float32)
        for layer, marks in self.readers.items():
            taken = marks != FREE
            np.maximum.at(found, marks[taken], np.asarray(peaks[layer], np.float32)[taken])
        return found

    def weight_peaks(self) -> Array:
        """Return, for each scale, the largest weight magnitude that it multiplies: float32 [scales]."""
        return self.pooled({layer: _row_peaks(layer) for layer in self.readers})

    def spread(self, layer: Layer, scales: Array) -> Array:
        """Return the factor of each input channel of `layer`: float32 [channels]."""
        marks = self.readers[layer]
        return np.where(marks == FREE, np.float32(1), np.asarray(scales, np.float32)[np.maximum(marks, 0)])

    def norm_peaks(self) -> Array | None:
        """Return an estimate of the largest magnitude of each scale's channels from the norm that makes the
        input, |beta| + 3 |gamma|; None where no LayerNormalization does.

        A normalised element is rarely beyond three standard deviations.
        """
        found = {}
        for layer in self.readers:
            norm = layer.input.producer()
            if norm is None or not _is_plain_norm(norm):
                return None
            found[layer] = np.abs(_parameter(norm, 2)) + 3 * np.abs(_parameter(norm, 1))
        return self.pooled(found)


def scale_groups(model: ir.Model) -> list[ScaleGroup]:
    """Return the groups of the main graph, in order of execution; float32 layers only.

    Linear layers that nothing can scale are grouped by the value that they read; convolutions are named only
    where something absorbs their scale.
    """
    layers = {layer.node: layer for layer in find_layers(model)[0] if not layer.in_subgraph}
    groups: list[ScaleGroup] = []
    covered: set[Layer] = set()
    for layer in layers.values():
        if (
            layer.kind is LayerKind.EMBEDDING
            or layer in covered
            or layer.weight.dtype is not ir.DataType.FLOAT
        ):
            continue
        group = _group(layer, layers)
        if group is not None:
            groups.append(group)
            covered.update(group.readers)
    return groups


def _group(layer: Layer, layers: Mapping[ir.Node, Layer]) -> ScaleGroup | None:
    try:
        region = grow_region(layer, layers)
    except NotEquivariantError as error:
        return _shared_input(layer, layers, str(error)) if layer.is_linear else None
    kinds = {_dtype(item.node.inputs[item.index]) for item in region.parameters}
    if kinds != {ir.DataType.FLOAT}:
        return _shared_input(layer, layers, "not all constants are float32") if layer.is_linear else None
    return ScaleGroup(region.readers, region.scales, region)


def _shared_input(layer: Layer, layers: Mapping[ir.Node, Layer], obstacle: str) -> ScaleGroup:
    readers = [
        other
        for other in layers.values()
        if other.is_linear and other.input is layer.input and other.weight.dtype is ir.DataType.FLOAT
    ]
    channels = layer.weight_array().shape[0]
    return ScaleGroup({other: np.arange(channels) for other in readers}, channels, None, obstacle)


def _dtype(value: ir.Value | None) -> ir.DataType | None:
    return value.dtype if value is not None else None


def _row_peaks(layer: Layer) -> Array:
    """Return the largest weight magnitude of each input channel."""
    weight = np.abs(layer.weight_array())
    if layer.is_linear:
        return np.asarray(weight.max(axis=1, initial=0))
    attribute = layer.node.attributes.get("group")
    groups = attribute.as_int() if attribute is not None else 1
    by_group = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return np.asarray(by_group.max(axis=(1, *range(3, by_group.ndim)), initial=0)).reshape(-1)


def _parameter(norm: ir.Node, index: int) -> Array:
    tensor = constant(norm.inputs[index]) if len(norm.inputs) > index else None
    return np.asarray(tensor.numpy()) if tensor is not None else np.zeros(1, np.float32)


def _is_plain_norm(node: ir.Node) -> bool:
    if node.op_type != "LayerNormalization" or int_attribute(node, "axis", -1) not in (-1,):
        return False
    parameters = [value for value in node.inputs[1:] if value is not None]
    return all((tensor := constant(value)) is not None and len(tensor.shape) == 1 for value in parameters)
