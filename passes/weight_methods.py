# SPDX-License-Identifier: Apache-2.0
"""How weights are rounded to blocks of few bits: to nearest, in searched ranges, or with the layer's input in
view."""

from __future__ import annotations

import enum
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from splitfold.passes.affine import BlockQuantized, held_blocks, pack_codes, unpack_codes
from splitfold.passes.block_grid import BlockLayout
from splitfold.passes.clip_search import awq_clip, mse_grid
from splitfold.passes.dgq import DualGrained, dual_grained
from splitfold.passes.gptq import Compensation, compensated
from splitfold.passes.gram import Gram, GramRequest, grams_in_chunks
from splitfold.passes.gram_loss import normalised
from splitfold.passes.layers import Layer
from splitfold.passes.score_layers import score_makers
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.feeds import Array
from splitfold.runtime.target import Target

__all__ = ["Rounded", "Rounding", "WeightMethod", "round_from_data", "round_weights"]

logger = logging.getLogger(__name__)


class WeightMethod(enum.Enum):
    """How weights are rounded."""

    RTN = "rtn"
    """To the nearest code of the block's whole range."""
    MSE = "mse"
    """To the nearest code of the range with the least squared weight error."""
    AWQ = "awq"
    """To the nearest code of the range with the least output error of the layer: AWQ's clip search."""
    GPTQ = "gptq"
    """Column by column, later columns making up for the errors of earlier ones."""
    DGQ = "dgq"
    """To the nearest code of a dual-grained grid: integer scales inside a channel."""

    @property
    def needs_data(self) -> bool:
        """Whether it looks at calibration data."""
        return self in (WeightMethod.AWQ, WeightMethod.GPTQ, WeightMethod.DGQ)


@dataclass(frozen=True)
class Rounding:
    """A method and the layout that it rounds to.

    Attributes:
        method: how.
        layout: of the blocks.
        compensation: options of GPTQ.
        int8_levels: largest magnitude of DGQ's integers.
    """

    method: WeightMethod
    layout: BlockLayout
    compensation: Compensation = field(default_factory=Compensation)
    int8_levels: int = 127


@dataclass(frozen=True, eq=False)
class Rounded:
    """A weight after rounding, its codes packed: those of all layers are held until the first is replaced.

    Attributes:
        how: what was done, for the record.
    """

    packed: BlockQuantized | DualGrained
    block: int
    how: str

    @staticmethod
    def of(weight: BlockQuantized | DualGrained, how: str) -> Rounded:
        """Return `weight` to be held."""
        packed = replace(weight, codes=pack_codes(weight.codes, weight.bits))
        return Rounded(packed, weight.codes.shape[-1], how)

    def weight(self) -> BlockQuantized | DualGrained:
        """Return the weight."""
        return replace(self.packed, codes=unpack_codes(self.packed.codes, self.packed.bits, self.block))


def round_weights(layers: Sequence[Layer], rounding: Rounding) -> dict[ir.Value, Rounded]:
    """Return the distinct weights of `layers`, rounded by a method that needs no data."""
    how = "" if rounding.method is WeightMethod.RTN else f" by {rounding.method.value}"
    return {
        weight: Rounded.of(_by_weight(users[0], rounding.layout, rounding.method), how)
        for weight, users in _users(layers).items()
    }


def round_from_data(
    model: ir.Model, layers: Sequence[Layer], rounding: Rounding, calibration: Calibration, target: Target
) -> dict[ir.Value, Rounded]:
    """Return the distinct weights of `layers`, rounded with their inputs in view.

    Every layer sees the float model's activations. A weight that several layers share is rounded once, for
    the inputs of all of them. Where nothing finite is known of an input the weight error takes the place of
    the output error, with the reason on record.

    Args:
        model: float model, not changed.
        layers: MatMul and Gemm.
        rounding: AWQ, GPTQ or DGQ.
        calibration: read once, or once for each chunk of Gram matrices that may be held.
        target: where the model runs.

    Raises:
        CalibrationError: a batch does not fit, or the data is empty.
    """
    users = _users(layers)
    scores = score_makers(model) if rounding.method is WeightMethod.AWQ else set()
    rounded: dict[ir.Value, Rounded] = {}
    seen: list[ir.Value] = []
    for weight, own in users.items():
        if any(layer.node in scores for layer in own):
            held = _by_weight(own[0], rounding.layout, WeightMethod.RTN)
            rounded[weight] = Rounded.of(held, " by awq, unclipped: its output makes attention scores")
        elif reason := _unseen(own, model):
            rounded[weight] = _fallback(own[0], rounding, reason)
        else:
            seen.append(weight)
    needs = [_requests(users[weight], model, rounding) for weight in seen]
    for chunk, grams in grams_in_chunks(model, needs, calibration, target):
        for position in chunk:
            weight = seen[position]
            rounded[weight] = _from_grams(users[weight], needs[position], grams, rounding)
    return rounded


def _users(layers: Sequence[Layer]) -> dict[ir.Value, list[Layer]]:
    users: dict[ir.Value, list[Layer]] = {}
    for layer in layers:
        users.setdefault(layer.weight, []).append(layer)
    return users


def _unseen(layers: Sequence[Layer], model: ir.Model) -> str | None:
    """Return why the input of none of `layers` can be looked at, or None."""
    reasons = [_unseen_input(layer, model) for layer in layers]
    return None if None in reasons else reasons[0]


def _unseen_input(layer: Layer, model: ir.Model) -> str | None:
    producer = layer.input.producer()
    if layer.in_subgraph or (producer is not None and producer.graph is not model.graph):
        return "it stands in a subgraph, whose activations cannot be seen"
    if producer is None and layer.input not in model.graph.inputs:
        return "its input is constant"
    return None


def _requests(layers: Sequence[Layer], model: ir.Model, rounding: Rounding) -> list[GramRequest]:
    block = rounding.layout.block if rounding.method is WeightMethod.AWQ else None
    columns = layers[0].weight_array().shape[0]
    names = [layer.input.name or "" for layer in layers if _unseen_input(layer, model) is None]
    return [GramRequest(name, columns, block) for name in dict.fromkeys(names)]


def _from_grams(
    layers: Sequence[Layer],
    requests: Sequence[GramRequest],
    grams: Mapping[GramRequest, Gram],
    rounding: Rounding,
) -> Rounded:
    finite = [grams[request].total for request in requests if grams[request].finite]
    if not finite:
        reason = f"calibration saw NaN, infinity or overflow in '{requests[0].value}'"
        return _fallback(layers[0], rounding, reason)
    total = finite[0] if len(finite) == 1 else np.sum(finite, axis=0)
    if not total.any():
        return _fallback(layers[0], rounding, f"'{requests[0].value}' is zero in all of the calibration data")
    return Rounded.of(_by_output(layers[0], total, rounding), f" by {rounding.method.value}")


def _matrix(layer: Layer) -> Array:
    return np.ascontiguousarray(layer.weight_array().T, np.float32)


def _by_output(layer: Layer, gram: Array, rounding: Rounding) -> BlockQuantized | DualGrained:
    matrix, layout = _matrix(layer), rounding.layout
    if rounding.method is WeightMethod.DGQ:
        return dual_grained(matrix, layout, gram, int8_levels=rounding.int8_levels)
    if rounding.method is WeightMethod.GPTQ:
        codes, grid = compensated(matrix, layout, gram, rounding.compensation)
    else:
        clamped = awq_clip(layout.blocked(matrix), layout, normalised(gram))
        grid = layout.grid(clamped)
        codes = grid.codes(clamped)
    return held_blocks(codes, grid, layout, columns=matrix.shape[1])


def _by_weight(layer: Layer, layout: BlockLayout, method: WeightMethod) -> BlockQuantized:
    x = layout.blocked(_matrix(layer))
    grid = mse_grid(x, layout) if method is WeightMethod.MSE else layout.grid(x)
    return held_blocks(grid.codes(x), grid, layout, columns=layer.weight_array().shape[0])


def _fallback(layer: Layer, rounding: Rounding, reason: str) -> Rounded:
    logger.info("%s: %s", layer.name, reason)
    if rounding.method is WeightMethod.DGQ:
        matrix = _matrix(layer)
        held = dual_grained(
            matrix, rounding.layout, np.eye(matrix.shape[1]), int8_levels=rounding.int8_levels
        )
        return Rounded.of(held, f" by dgq on the weights alone: {reason}")
    held_in_blocks = _by_weight(layer, rounding.layout, WeightMethod.MSE)
    return Rounded.of(held_in_blocks, f" by mse, not {rounding.method.value}: {reason}")
