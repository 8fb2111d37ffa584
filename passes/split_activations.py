# SPDX-License-Identifier: Apache-2.0
"""Activations cut into chunks of channels, each of which gets a range of its own."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.branches import BranchKind, branch_of_node
from splitfold.passes.chunks import ChunkedValues, channels_of, cut_input, cut_output, even_sizes, groups_of
from splitfold.passes.functions import chunkable, cut_function, split_obstacle
from splitfold.passes.identity import display_layer
from splitfold.passes.layers import Layer, LayerKind, find_layers
from splitfold.passes.opset import default_opset
from splitfold.passes.values import constant, drop_unused, replace_value

__all__ = ["SplitActivationsPass", "SplitAt"]

_SIZES_AS_INPUT = 13


class SplitAt(enum.Enum):
    """Where activations are cut."""

    LAYERS = "layers"
    """Before a layer, which is cut along its input channels: the products of the chunks are added."""
    FUNCTIONS = "functions"
    """Around an activation function (SplitQuant): its results are concatenated."""
    OUTPUTS = "outputs"
    """After a convolution, which is cut along its output channels: its slices are concatenated."""


@dataclass(frozen=True)
class SplitActivationsPass(LayerPass):
    """Cut activations into chunks of channels, so that quantize-activations gives each chunk its own grid
    (SplitQuant, arXiv 2501.12428, section on activations).

    The work stays the same: a chunk is multiplied with its own rows of the weight only. Chunks that a Concat
    joined are read one by one, so that cuts at outputs, functions and layers meet.

    Args:
        parts: 2 to 16 chunks of as many channels; fewer where there are fewer channels (or groups).
        at: layers (for MatMul and Gemm this is all it takes), functions or outputs.

    Before::

        y = MatMul(x, W)

    After::

        x_1, x_2, x_3 = Split<axis=-1>(x)
        y = Sum(MatMul(x_1, W_1), MatMul(x_2, W_2), MatMul(x_3, W_3))
    """

    name: ClassVar[str] = "split-activations"
    contract: ClassVar[Contract] = Contract.EXACT
    takes: ClassVar[str] = "MatMul, Gemm and Conv with a constant weight, or activation functions"
    parts: int = 3
    at: SplitAt = SplitAt.LAYERS

    def __post_init__(self) -> None:
        if not 2 <= self.parts <= 16:
            raise ValueError(f"parts is {self.parts}; it may be 2 to 16.")

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        if self.at is SplitAt.FUNCTIONS:
            return self._functions(model, findings)
        layers, refused = find_layers(model)
        self.check_patterns([*(layer.name for layer in layers), *(name for name, _ in refused)])
        findings.skipped.extend(refused)
        chunked, changed = ChunkedValues(), False
        for layer in layers:
            if layer.kind is LayerKind.EMBEDDING or (self.at is SplitAt.OUTPUTS and layer.is_linear):
                continue
            reason = self.unwanted(*layer.addresses) or self._reason_against(layer, model)
            if reason is not None:
                findings.skip(layer.name, reason)
                continue
            count = self._cut(layer.current(), chunked)
            findings.apply(layer.name, f"{layer.kind.value} in {count} {self._pieces} of channels")
            changed = True
        return changed

    @property
    def _pieces(self) -> str:
        return "slices" if self.at is SplitAt.OUTPUTS else "chunks"

    def _reason_against(self, layer: Layer, model: ir.Model) -> str | None:
        if default_opset(model) < _SIZES_AS_INPUT:
            return f"opset {default_opset(model)} has no Split by sizes of an input (13 has)"
        done = {BranchKind.GROUP, BranchKind.SLICE if self.at is SplitAt.OUTPUTS else BranchKind.CHUNK}
        if not done.isdisjoint(mark.kind for mark in branch_of_node(layer.node)):
            return f"it is one of the {self._pieces} of a split layer"
        if constant(layer.input) is not None:
            return "its input is constant"
        if not layer.weight_array().size:
            return "its weight is empty"
        if self._channels(layer) < 2:
            return f"it has one {'output' if self.at is SplitAt.OUTPUTS else 'input'} channel"
        cuts_bias = groups_of(layer) > 1 or self.at is SplitAt.OUTPUTS
        if cuts_bias and layer.bias is not None and constant(layer.bias) is None:
            return "its bias is computed, and would have to be cut"
        return None

    def _channels(self, layer: Layer) -> int:
        """Return how many channels (groups of them, of a grouped convolution) can be told apart."""
        if groups_of(layer) > 1:
            return groups_of(layer)
        weight = layer.weight_array()
        if self.at is SplitAt.OUTPUTS:
            return len(weight)
        return int(weight.shape[0 if layer.is_linear else 1])

    def _cut(self, layer: Layer, chunked: ChunkedValues) -> int:
        """Put the cut layer in the place of `layer`, and return in how many pieces."""
        axis, groups, weight = -1 if layer.is_linear else 1, groups_of(layer), layer.weight_array()
        unit = 1 if groups == 1 else int(weight.shape[1])
        given = chunked.sizes(layer.input, axis, self.parts)
        fits = given is not None and all(size % unit == 0 for size in given)
        counts = even_sizes(self._channels(layer), self.parts)
        sizes = given if given is not None and fits else [count * unit for count in counts]
        if self.at is SplitAt.OUTPUTS and groups == 1:
            total, sizes = cut_output(layer, counts), counts
        else:
            total = cut_input(layer, chunked.of(layer.input, axis, sizes, layer.node), sizes)
        joined = layer.input.producer()
        replace_value(layer.output, total)
        drop_unused([layer.node] if joined is None else [layer.node, joined])
        return len(sizes)

    def _functions(self, model: ir.Model, findings: Findings) -> bool:
        nodes = [node for graph in model.graphs() for node in graph if chunkable(node)]
        if nodes:
            self.check_patterns(display_layer(node) for node in nodes)
        chunked, changed = ChunkedValues(), False
        for node in nodes:
            name = display_layer(node)
            axis = split_obstacle(node)
            reason = self.unwanted(name) or (axis if isinstance(axis, str) else None)
            if reason is None and default_opset(model) < _SIZES_AS_INPUT:
                reason = f"opset {default_opset(model)} has no Split by sizes of an input (13 has)"
            if reason is not None or isinstance(axis, str):
                findings.skip(name, str(reason))
                continue
            value = node.inputs[0]
            channels = channels_of(value, axis) if value is not None else None
            if value is None or not channels or channels < 2:
                findings.skip(name, "the number of its channels is not known, or one")
                continue
            sizes = chunked.sizes(value, axis, self.parts) or even_sizes(channels, self.parts)
            cut_function(node, axis, sizes, chunked)
            findings.apply(name, f"{node.op_type} in {len(sizes)} chunks of channels")
            changed = True
        return changed
