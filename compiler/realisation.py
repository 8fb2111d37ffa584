# SPDX-License-Identifier: Apache-2.0
"""Kernel realisation: which kernel of the target really reads each low-bit weight, read from the runtime's
own optimised graph."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from splitfold.passes.joined_weights import joined_weights
from splitfold.passes.pipeline import PassRecord
from splitfold.passes.values import sole_consumer
from splitfold.runtime.placement import Placement
from splitfold.runtime.session import Session, optimized_graph
from splitfold.runtime.target import Target

__all__ = ["Realisation", "Unrealised", "read_realisation"]


class Unrealised(enum.Enum):
    """What happens to a layer that was to be low-bit and that no low-bit kernel computes."""

    FLOAT = "float"
    """It is put back to float: DequantizeLinear and a float kernel are slower than the float layer was."""
    KEEP = "keep"
    """It stays as it is: smaller, slower."""
    ERROR = "error"
    """Compilation fails."""


@dataclass(frozen=True)
class Realisation:
    """What one layer came to.

    Attributes:
        layer: user-facing name.
        kernel: operator of the runtime's optimised graph that reads the low-bit weight; the provider's name
            where it compiles the graph, whose kernels nobody sees.
        realised: whether that operator computes in low precision; of a provider that compiles, whether it was
            given the layer.
    """

    layer: str
    kernel: str
    realised: bool


def read_realisation(model: ir.Model, records: Iterable[PassRecord], target: Target) -> list[Realisation]:
    """Open `model` as deployed and return what became of each layer that a pass carried in low precision.

    Raises:
        SessionError: the runtime refuses the model.
    """
    joined = joined_weights(model)
    carried = [
        (layer, joined.get(weight, weight))
        for record in records
        for layer, names in record.carried.items()
        for weight in names
    ]
    if not carried:
        return []
    if target.compiles:
        return _placed(model, carried, Session(model, target).placement)
    optimized = optimized_graph(model, target)
    readers, unpacked = _readers(optimized), _unpacked(model)
    outputs = _outputs_by_weight(model)
    producers = {value.name: node for graph in optimized.graphs() for node in graph for value in node.outputs}
    found = []
    for layer, weight in carried:
        read = readers.get(weight) or readers.get(unpacked.get(weight, weight))
        kernel = read or _by_output(producers, outputs.get(weight, ()))
        low_bit = kernel in target.low_bit_kernels or (kernel == "Gather" and _is_integer(model, weight))
        found.append(Realisation(layer, kernel, low_bit))
    return found


def _placed(
    model: ir.Model, carried: Iterable[tuple[str, str]], placement: Placement | None
) -> list[Realisation]:
    """Return, by layer, whether the provider that compiles runs it: what another one runs is not realised."""
    left = {node.name: node.operator for node in placement.left} if placement is not None else {}
    outputs = _outputs_by_weight(model)
    names = {value.name: node.name for graph in model.graphs() for node in graph for value in node.outputs}
    found = []
    for layer, weight in carried:
        nodes = [names.get(output) for output in outputs.get(weight, ())]
        away = next((left[name] for name in nodes if name in left), None)
        kernel = "OpenVINO" if away is None else f"{away} on the CPU provider"
        found.append(Realisation(layer, kernel, away is None))
    return found


def _is_integer(model: ir.Model, weight: str) -> bool:
    """Whether the table is held in integers: a Gather then moves low-bit rows, which are scaled after it."""
    held = model.graph.initializers.get(weight)
    return held is not None and held.dtype is not None and held.dtype.is_integer()


def _readers(model: ir.Model) -> dict[str, str]:
    return {
        value.name or "": node.op_type
        for graph in model.graphs()
        for node in graph
        for value in node.inputs
        if value is not None and value.is_initializer()
    }


def _outputs_by_weight(model: ir.Model) -> dict[str, tuple[str, ...]]:
    """Return, by weight name, the outputs of the operator that computes with it, through its Q/DQ."""
    found: dict[str, tuple[str, ...]] = {}
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            nodes = [use.node for use in value.uses()]
            through = [
                use.node
                for node in nodes
                if node.op_type == "DequantizeLinear"
                for use in node.outputs[0].uses()
            ]
            found[name] = tuple(output.name or "" for node in through or nodes for output in node.outputs)
    return found


def _unpacked(model: ir.Model) -> dict[str, str]:
    """Return, by weight name, the constant that the model makes of it alone, which the runtime folds."""
    last: dict[ir.Value, ir.Value] = {}
    starts = {value: name for graph in model.graphs() for name, value in graph.initializers.items()}
    known = set(starts)
    for node in (node for graph in model.graphs() for node in graph):
        operands = [value for value in node.inputs if value is not None]
        kept = node.op_type != "DequantizeLinear" or _quantized_again(node)
        if kept and operands and known.issuperset(operands):
            known.update(node.outputs)
            last.update(dict.fromkeys(operands, node.outputs[0]))
    return {name: _end(value, last).name or "" for value, name in starts.items() if value in last}


def _quantized_again(node: ir.Node) -> bool:
    """Whether what `node` dequantizes is turned and quantized again, which the runtime folds too."""
    turned = sole_consumer(node.outputs[0])
    last = sole_consumer(turned.outputs[0]) if turned is not None else None
    return last is not None and last.op_type == "QuantizeLinear"


def _end(value: ir.Value, last: Mapping[ir.Value, ir.Value]) -> ir.Value:
    while value in last:
        value = last[value]
    return value


def _by_output(producers: Mapping[str | None, ir.Node], outputs: Iterable[str]) -> str:
    """Return the kernel that makes one of `outputs` where the runtime renamed (repacked) the weight."""
    for output in outputs:
        if output in producers:
            return producers[output].op_type
    return "not found in the runtime's graph"
