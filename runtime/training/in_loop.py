# SPDX-License-Identifier: Apache-2.0
"""Quantization in the loop: layers of a lifted model train on the numbers that a grid leaves of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.fx
from torch import nn

from splitfold.runtime.lift.lifted import ORIGIN, Lifted
from splitfold.runtime.training.fake_inputs import FakeInput
from splitfold.runtime.training.fake_weights import FakeWeight, WeightScale

__all__ = ["Annealing", "InLoop", "put_in_loop"]

_BITS = range(2, 9)


@dataclass(frozen=True)
class Annealing:
    """Confidence-guided annealing (OFQ, arXiv 2302.02210, section 3.3): in the last steps only weights near a
    threshold between two codes move, until each has settled.

    Args:
        steps: how many of the last steps.
        barrier: a weight moves while it is at most this far from a threshold, in steps of its grid.
    """

    steps: int
    barrier: float = 0.005

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.barrier <= 0.5:
            raise ValueError(f"{self}: steps is at least 1, barrier above 0 and at most 0.5.")


@dataclass(frozen=True)
class InLoop:
    """What is quantized while a model trains.

    The weights that come back are float: with `WeightScale.RANGE` those that were trained, for a symmetric
    quantizer with a scale an output channel to round as training did; with `WeightScale.STATISTICS` those on
    the grid, as no quantizer searches for that one.

    Args:
        weights: bits of the weights of MatMul, Gemm and Conv, 2 to 8, a grid for each output channel; None
            trains them in float.
        activations: bits of what these layers read, 2 to 8, one static grid a tensor; None leaves it in
            float.
        scale: what the weights' grids follow.
        momentum: how much of the old range of an activation each batch leaves.
        annealing: how training ends, or None.

    Raises:
        ValueError: a width is not 2 to 8, or there is nothing to quantize or to anneal.
    """

    weights: int | None = 8
    activations: int | None = 8
    scale: WeightScale = WeightScale.RANGE
    momentum: float = 0.9
    annealing: Annealing | None = None

    def __post_init__(self) -> None:
        for name, bits in (("weights", self.weights), ("activations", self.activations)):
            if bits is not None and bits not in _BITS:
                raise ValueError(f"{name} is {bits}; it may be 2 to 8, or None for float.")
        if self.weights is None and (self.activations is None or self.annealing is not None):
            raise ValueError("no weights are quantized: there is nothing to anneal, or nothing at all.")


def put_in_loop(lifted: Lifted, in_loop: InLoop) -> Mapping[str, FakeWeight]:
    """Let the layers of a lifted model compute on grids; return the grid of each weight by its parameter.

    A layer is a MatMul, Gemm or Conv that reads a parameter of rank 2 or more as its second operand; a
    parameter that several layers read has one grid, and so has an activation.
    """
    module = lifted.module
    parameters = dict(module.named_parameters())
    grids: dict[str, FakeWeight] = {}
    made: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in list(module.graph.nodes):
        weight = _weight(node, parameters)
        if weight is None:
            continue
        data = node.args[0]
        if in_loop.weights is not None:
            if weight not in made:
                grid = FakeWeight(in_loop.weights, _axis(node), in_loop.scale)
                grids[str(weight.target)] = grid
                made[weight] = _after(module, weight, f"fake_weight_{len(made)}", grid)
            node.args = (data, made[weight], *node.args[2:])
        if in_loop.activations is not None and isinstance(data, torch.fx.Node):
            if data not in made:
                reader = FakeInput(in_loop.activations, in_loop.momentum)
                made[data] = _after(module, data, f"fake_input_{len(made)}", reader)
            node.args = (made[data], *node.args[1:])
    module.recompile()
    return grids


def _weight(node: torch.fx.Node, parameters: Mapping[str, nn.Parameter]) -> torch.fx.Node | None:
    """Return the weight of a layer, a parameter, or None where the node is none."""
    origin = node.meta.get(ORIGIN)
    if origin is None or origin.op_type not in ("MatMul", "Gemm", "Conv") or len(node.args) < 2:
        return None
    weight = node.args[1]
    if not isinstance(weight, torch.fx.Node) or weight.op != "get_attr":
        return None
    held = parameters.get(str(weight.target))
    return weight if held is not None and held.ndim >= 2 else None


def _axis(node: torch.fx.Node) -> int:
    if node.meta[ORIGIN].op_type == "Conv":
        return 0
    return 0 if node.kwargs.get("transB") else -1


def _after(module: torch.fx.GraphModule, node: torch.fx.Node, name: str, made: nn.Module) -> torch.fx.Node:
    module.add_submodule(name, made)
    with module.graph.inserting_after(node):
        return module.graph.call_module(name, (node,))
