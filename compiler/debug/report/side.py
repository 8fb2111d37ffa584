# SPDX-License-Identifier: Apache-2.0
"""One of the two models of a report: its nodes by layer, what its constants are held in, and the kernels that
run them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from splitfold.compiler.debug.report.data import Held, Precision
from splitfold.compiler.inspection import LayerFacts, weighted_nodes
from splitfold.passes.base import Findings
from splitfold.passes.canonicalize import name_all
from splitfold.passes.identity import display_layer, layers_of

__all__ = ["Side", "make_side"]

_DOWNSTREAM = 8
"""Nodes after a layer's main one in which the runtime may have fused it."""


@dataclass(frozen=True)
class Side:
    """A model, seen layer by layer.

    Attributes:
        model: with names for all values, nodes and layers.
        runtime: the graph that the runtime executes, or None where it cannot open the model.
        nodes: nodes by layer, in order.
        weighted: (node, facts) of each layer's largest weight.
        sizes: bytes of constants by layer.
        dtypes: element type of each layer's largest constant; scalars (scales, axes) do not count.
        precisions: what each layer's largest weight (else its largest constant) is held in.
        kernels: operators of `runtime` that compute each layer.
        made_by: operator of `runtime` by the name of the value that it computes.
    """

    model: ir.Model
    runtime: ir.Model | None
    nodes: Mapping[str, tuple[ir.Node, ...]]
    weighted: Mapping[str, tuple[ir.Node, LayerFacts]]
    sizes: Mapping[str, int]
    dtypes: Mapping[str, ir.DataType]
    precisions: Mapping[str, Precision]
    kernels: Mapping[str, str]
    made_by: Mapping[str, str]

    def held(self, layer: str) -> Held | None:
        """Return what the layer holds, or None where no node of it is left."""
        if layer not in self.nodes:
            return None
        size = self.sizes.get(layer, 0)
        words = self.dtypes[layer].name.lower() if layer in self.dtypes else ""
        text = self.weighted[layer][1].precision if layer in self.weighted else words
        return Held(self.precisions[layer], text, size, self.kernels[layer])


def make_side(model: ir.Model, runtime: ir.Model | None) -> Side:
    """Return `model`, which is not changed, layer by layer."""
    named = model.clone()
    name_all(named, Findings())
    nodes: dict[str, list[ir.Node]] = {}
    for graph in named.graphs():
        for node in graph:
            for layer in layers_of(node) or (display_layer(node),):
                nodes.setdefault(layer, []).append(node)
    weighted = _weighted(named)
    sizes, dtypes = _constants(named)
    precisions = {
        layer: _precision_of(weighted[layer][1]) if layer in weighted else _of_dtype(dtypes.get(layer))
        for layer in nodes
    }
    made_by = _producers(runtime)
    kernels = {
        layer: _kernel([weighted[layer][0]] if layer in weighted else members, made_by)
        for layer, members in nodes.items()
    }
    held = {layer: tuple(members) for layer, members in nodes.items()}
    return Side(named, runtime, held, weighted, sizes, dtypes, precisions, kernels, made_by)


def _weighted(model: ir.Model) -> dict[str, tuple[ir.Node, LayerFacts]]:
    found: dict[str, tuple[ir.Node, LayerFacts]] = {}
    for node, facts in weighted_nodes(model):
        for layer in layers_of(node)[:1] or (facts.layer,):
            if layer not in found or found[layer][1].size < facts.size:
                found[layer] = (node, facts)
    return found


def _constants(model: ir.Model) -> tuple[dict[str, int], dict[str, ir.DataType]]:
    """Return bytes of constants by layer (one that several read counts at the first), and the element type of
    the largest that is no scalar."""
    sizes: dict[str, int] = {}
    largest: dict[str, tuple[int, ir.DataType]] = {}
    counted: set[ir.Value] = set()
    for graph in model.graphs():
        for node in graph:
            layer = (layers_of(node) or (display_layer(node),))[0]
            for value in node.inputs:
                if value is None or value.const_value is None or not value.is_initializer():
                    continue
                size, dtype = value.const_value.nbytes, value.const_value.dtype
                if value not in counted:
                    counted.add(value)
                    sizes[layer] = sizes.get(layer, 0) + size
                if value.const_value.size > 1 and size > largest.get(layer, (0, dtype))[0]:
                    largest[layer] = (size, dtype)
    return sizes, {layer: dtype for layer, (_, dtype) in largest.items()}


def _precision_of(facts: LayerFacts) -> Precision:
    text = facts.precision
    if " bits, block" in text:
        bits = int(text.split()[0])
        return Precision.WEIGHTS if bits >= 8 else Precision.FOUR if bits >= 4 else Precision.FEWER
    held, _, activations = text.partition(", activations ")
    if held.endswith("int4"):
        return Precision.FOUR
    if held.endswith("int2"):
        return Precision.FEWER
    if held in ("int8", "uint8"):
        chosen = {"static": Precision.STATIC, "dynamic": Precision.DYNAMIC}
        return chosen.get(activations, Precision.WEIGHTS)
    return Precision.HALF if held in ("float16", "bfloat16") else Precision.FLOAT


def _of_dtype(dtype: ir.DataType | None) -> Precision:
    if dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        return Precision.HALF
    return Precision.FLOAT if dtype is not None and dtype.is_floating_point() else Precision.OTHER


def _producers(runtime: ir.Model | None) -> dict[str, str]:
    if runtime is None:
        return {}
    return {
        value.name: node.op_type
        for graph in runtime.graphs()
        for node in graph
        for value in node.outputs
        if value.name
    }


def _kernel(nodes: Iterable[ir.Node], made_by: Mapping[str, str]) -> str:
    """Return the runtime's operators that make the values of `nodes`, or the first value after them that the
    runtime still computes: it was fused into that."""
    found: dict[str, None] = {}
    for node in nodes:
        pending, seen = [node], 0
        while pending and seen < _DOWNSTREAM:
            at = pending.pop(0)
            seen += 1
            kernels = [made_by[value.name] for value in at.outputs if value.name and value.name in made_by]
            if kernels:
                found.update(dict.fromkeys(kernels))
                break
            pending.extend(at.successors())
    return ", ".join(found)
