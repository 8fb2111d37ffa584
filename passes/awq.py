# SPDX-License-Identifier: Apache-2.0
"""AWQ's scale search: the salient input channels of a weight are those that large activations meet.

Lin et al., 2024, section 3.2: s = mean|x|^ratio, the ratio found on a grid by the error of the block's
output. The released code never tries a ratio of 1; here it is on the grid.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitfold.passes.affine import dequantize_blocks, quantize_blocks
from splitfold.passes.digraph import meeting_points
from splitfold.passes.foldable import ScaleGroup
from splitfold.passes.gram_loss import row_losses
from splitfold.passes.layers import Layer
from splitfold.passes.submodel import nodes_between, part_of, read_values, type_inputs
from splitfold.passes.walk import Walk
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.session import Optimization, Session
from splitfold.runtime.target import Target

__all__ = ["BlockFormat", "Choice", "awq_scales", "search_awq"]

logger = logging.getLogger(__name__)

_GRID = np.arange(21) / 20
_FLOOR = 1e-4
_TINY = float(np.finfo(np.float32).tiny)
_WIDEST = 60
"""Nodes of a block: a meeting point that is further away is not a block any more."""


@dataclass(frozen=True)
class BlockFormat:
    """The format that the weights will be held in.

    Attributes:
        bits: 2, 3, 4 or 8.
        block: rows that share a scale.
        symmetric: whether the zero point is fixed.
    """

    bits: int
    block: int
    symmetric: bool

    def round_trip(self, weight: Array) -> Array:
        """Return a [K, N] weight as it comes back: float32."""
        stored = 4 if self.bits == 3 else self.bits
        matrix = np.ascontiguousarray(weight.T)
        codes = quantize_blocks(
            matrix, bits=stored, block=self.block, symmetric=self.symmetric, levels=2**self.bits
        )
        return dequantize_blocks(codes).T


@dataclass(frozen=True)
class Choice:
    """What the search found for one group.

    Attributes:
        scales: float32 [group.scales].
        ratio: exponent; 0 means no scaling.
        loss, plain: mean squared error of the block's output with these scales, and without.
    """

    scales: Array
    ratio: float
    loss: float
    plain: float

    @property
    def gain_db(self) -> float:
        """By how much the error of the block's output falls, in dB."""
        if self.plain <= 0 or self.loss <= 0:
            return 0.0
        return float(10 * np.log10(self.plain / self.loss))


def awq_scales(magnitudes: Array, ratio: float) -> Array:
    """Return s = a^ratio / sqrt(max s x min s), float32; a is clamped at 1e-4 (a dead channel), as in the
    released code.

    Args:
        magnitudes: mean |x| of each channel.
        ratio: 0 (no scaling) to 1.
    """
    scales = np.maximum(np.asarray(magnitudes, np.float64), _FLOOR) ** ratio
    return np.asarray(scales / np.sqrt(scales.max() * scales.min()), np.float32)


def search_awq(
    model: ir.Model,
    groups: Sequence[ScaleGroup],
    batches: Iterable[Feeds],
    form: BlockFormat,
    target: Target,
    refuse: Callable[[ScaleGroup, str], None],
) -> dict[ScaleGroup, Choice]:
    """Return the best scales of each group; the model is run once, block by block, and no candidate runs more
    than its block.

    Args:
        model: float model, not changed.
        groups: linear groups, in order of execution.
        batches: a few batches of calibration data.
        form: what the weights will be held in.
        target: where blocks run.
        refuse: is told of a group that cannot be searched, and why.
    """
    walk = Walk(model, batches, target)
    blocks = _blocks(model, groups)
    found = {}
    for group in groups:
        names = dict.fromkeys(layer.input.name or "" for layer in group.readers)
        inputs = walk.values([*names, *blocks[group].given])
        rows = {
            layer: np.concatenate([_rows(batch[layer.input.name or ""]) for batch in inputs])
            for layer in group.readers
        }
        if not all(np.isfinite(array).all() for array in rows.values()):
            refuse(group, "its input holds infinities or NaN")
            continue
        found[group] = _search(group, blocks[group], inputs, rows, form, target)
        logger.info("%s: ratio %.2f, %.1f dB", group.name, found[group].ratio, found[group].gain_db)
    return found


def _rows(array: Array) -> Array:
    return np.asarray(array, np.float32).reshape(-1, array.shape[-1])


@dataclass(frozen=True, eq=False)
class _Block:
    """The nodes from a group's layers to where their outputs meet; a single layer is its own block."""

    nodes: tuple[ir.Node, ...]
    given: tuple[str, ...]
    output: str


def _blocks(model: ir.Model, groups: Sequence[ScaleGroup]) -> dict[ScaleGroup, _Block]:
    meetings = meeting_points(
        {node: list(_followers(node)) for node in model.graph},
        [[layer.node for layer in group.readers] for group in groups],
    )
    return {group: _block(group, node) for group, node in zip(groups, meetings, strict=True)}


def _followers(node: ir.Node) -> Iterator[ir.Node | None]:
    """Yield the readers of what `node` makes; None for the end of the graph, or a reader in a subgraph."""
    for value in node.outputs:
        yield from (use.node if use.node.graph is node.graph else None for use in value.uses())
        if value.is_graph_output():
            yield None


def _block(group: ScaleGroup, meeting: ir.Node | None) -> _Block:
    starts = {layer.node for layer in group.readers}
    if len(starts) == 1 or meeting is None:
        return _Block((), (), "")
    reached = _descendants(starts, meeting)
    given = dict.fromkeys(
        value.name or ""
        for node in reached
        for value in read_values(node)
        if value.producer() not in reached and not value.is_initializer()
    )
    if len(reached) > _WIDEST:
        return _Block((), (), "")
    return _Block(tuple(reached), tuple(given), meeting.outputs[0].name or "")


def _descendants(starts: set[ir.Node], end: ir.Node) -> list[ir.Node]:
    """Return the nodes on paths from `starts` to `end`, both included, in order of execution."""
    before = nodes_between(end.outputs[:1], ())
    reached, pending = set(starts), list(starts)
    while pending:
        for value in pending.pop().outputs:
            for use in value.uses():
                if use.node in before and use.node not in reached:
                    reached.add(use.node)
                    pending.append(use.node)
    graph = end.graph
    return [node for node in graph if node in reached] if graph is not None else []


Loss = Callable[[Mapping[Layer, Array]], float]


def _search(
    group: ScaleGroup,
    block: _Block,
    inputs: Sequence[Feeds],
    rows: Mapping[Layer, Array],
    form: BlockFormat,
    target: Target,
) -> Choice:
    magnitudes = group.pooled({layer: np.abs(array).mean(0) for layer, array in rows.items()})
    loss = _block_loss(block, group, inputs, target) if block.nodes else _layer_loss(rows)
    best, plain = None, 0.0
    for ratio in _GRID:
        scales = awq_scales(magnitudes, float(ratio))
        now = loss({layer: _tried(group, layer, scales, form) for layer in group.readers})
        plain = now if ratio == 0 else plain
        if best is None or now < best.loss:
            best = Choice(scales, float(ratio), now, plain)
    if best is None:
        raise ValueError(f"{group.name}: an empty grid")
    return best


def _tried(group: ScaleGroup, layer: Layer, scales: Array, form: BlockFormat) -> Array:
    factor = group.spread(layer, scales)[:, None]
    return np.asarray(form.round_trip(layer.weight_array() * factor) / factor, np.float32)


def _layer_loss(rows: Mapping[Layer, Array]) -> Loss:
    """Return the loss of layers on their own: the mean of (x E)^2, through X^T X where that is smaller."""
    products = {
        layer: array.T @ array if array.shape[1] <= len(array) else None for layer, array in rows.items()
    }

    def error(layer: Layer, weight: Array) -> float:
        off, product = weight - layer.weight_array(), products[layer]
        if product is None:
            return float(np.mean(np.square(rows[layer] @ off, dtype=np.float64)))
        size = max(float(np.abs(product).max()), _TINY)
        total = row_losses(np.ascontiguousarray(off.T), product / size).sum(dtype=np.float64)
        return float(total * size / (len(rows[layer]) * weight.shape[1]))

    return lambda weights: sum(error(layer, weight) for layer, weight in weights.items())


def _block_loss(block: _Block, group: ScaleGroup, inputs: Sequence[Feeds], target: Target) -> Loss:
    """Return the loss of a block opened once, whose weights are fed as inputs."""
    part, names = _open_block(block, group, inputs[0])
    session = Session(part, target, optimization=Optimization.ALL)
    plain = {layer: layer.weight_array() for layer in group.readers}

    def run(weights: Mapping[Layer, Array], batch: Feeds) -> Array:
        fed = {name: batch[name] for name in block.given}
        return session.run(fed | {names[layer]: array for layer, array in weights.items()})[block.output]

    references = [run(plain, batch) for batch in inputs]

    def loss(weights: Mapping[Layer, Array]) -> float:
        errors = [
            np.mean(np.square(run(weights, batch) - reference, dtype=np.float64))
            for batch, reference in zip(inputs, references, strict=True)
        ]
        return float(np.mean(errors))

    return loss


def _open_block(block: _Block, group: ScaleGroup, feeds: Feeds) -> tuple[ir.Model, dict[Layer, str]]:
    """Return the block as a model whose layers read their weights from inputs, and the inputs' names."""
    graph = block.nodes[0].graph
    if graph is None:
        raise ValueError(f"{group.name} is in no graph")
    end = next(value for node in block.nodes for value in node.outputs if value.name == block.output)
    part = part_of(graph, block.nodes, [end])
    type_inputs(part, feeds)
    copies = {node.outputs[0].name: node for node in part.graph}
    names = {}
    for number, layer in enumerate(group.readers):
        copy = copies[layer.output.name]
        name = f"weight_{number}_of_the_block"
        fed = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=layer.weight.shape)
        part.graph.inputs.append(fed)
        copy.replace_input_with(1, fed)
        names[layer] = name
    return part, names
