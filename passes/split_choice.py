# SPDX-License-Identifier: Apache-2.0
"""Which layers to split: those whose own output gains most for the bytes that splitting costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitfold.passes.affine import dequantize_blocks, quantize_blocks
from splitfold.passes.carriers import Carried, weight_graph
from splitfold.passes.emit_parts import emit_branch
from splitfold.passes.layers import Layer, LayerKind
from splitfold.passes.part_codes import Grain, Grouping, PartGrid, code_parts
from splitfold.passes.split_weight import matrix_of, split_parts, weight_of
from splitfold.passes.trial import Trial
from splitfold.passes.values import add_initializer
from splitfold.passes.weight_forms import stored_bytes
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.feeds import Array
from splitfold.runtime.target import Target

__all__ = ["Limits", "Offer", "Quantizer", "choose", "offers"]


@dataclass(frozen=True)
class Quantizer:
    """The quantizer that is to follow: rounding to nearest in blocks.

    Attributes:
        bits: 2, 3 (stored in 4), 4 or 8.
        block: weights of an output channel that share a scale.
        symmetric: whether the zero point is fixed.
        as_codes: whether split weights are held as one code a weight; else every part is a layer.
    """

    bits: int
    block: int
    symmetric: bool
    as_codes: bool

    def plain(self, matrix: Array, bits: int | None = None) -> tuple[Array, int]:
        """Return [n, k] as it comes back in `bits` (its own), and its stored bytes."""
        bits = self.bits if bits is None else bits
        held = quantize_blocks(
            matrix, bits=_width(bits), block=self.block, symmetric=self.symmetric, levels=2**bits
        )
        return dequantize_blocks(held), stored_bytes(held)

    def plain_bytes(self, shape: Sequence[int], bits: int) -> int:
        """Return the stored bytes of [n, k] in `bits`."""
        n, k = shape
        blocks = -(-k // self.block)
        zeros = 0 if self.symmetric else -(-blocks * _width(bits) // 8)
        return n * (blocks * self.block * _width(bits) // 8 + 4 * blocks + zeros)

    def split(self, matrix: Array, index: Array) -> tuple[Array, int]:
        """Return [n, k] as its parts come back, and their stored bytes."""
        if self.as_codes:
            held = code_parts(
                matrix, index, Grouping(Grain.BLOCK, self.block),
                bits=self.bits, symmetric=self.symmetric, grid=PartGrid.ZERO,
            )  # fmt: skip
            return held.values(), held.stored_bytes()
        found = [self.plain(part) for part in split_parts(matrix, index)]
        return np.sum([values for values, _ in found], axis=0), sum(size for _, size in found)

    def wider(self, size: int, shape: Sequence[int]) -> int:
        """Return the most bits that plain weights [n, k] of at most `size` bytes can have."""
        fits = [bits for bits in (4, 8) if bits > self.bits and self.plain_bytes(shape, bits) <= size]
        return max(fits, default=self.bits)


def _width(bits: int) -> int:
    """Return the width in which codes of `bits` are stored."""
    return 4 if bits == 3 else bits


@dataclass(frozen=True)
class Offer:
    """What splitting one layer buys and costs.

    Attributes:
        layer: its name.
        weights: how many weights it has.
        plain_db, split_db: SQNR of its own output, unsplit and split.
        plain_bytes, split_bytes: stored.
        work: multiply-adds of the unsplit layer (of a linear one, a row).
        extra_work: those that splitting adds.
        wider_bits, wider_db: the widest plain weights in no more bytes than the split ones, and their SQNR.
    """

    layer: str
    weights: int
    plain_db: float
    split_db: float
    plain_bytes: int
    split_bytes: int
    work: int
    extra_work: int
    wider_bits: int
    wider_db: float

    @property
    def gain_db(self) -> float:
        """By how far the error falls; 0 where both are exact."""
        return 0.0 if self.plain_db == self.split_db else self.split_db - self.plain_db

    @property
    def rate(self) -> float:
        """By how far noise to signal falls for a byte."""
        fall = 10 ** (-self.plain_db / 10) - 10 ** (-self.split_db / 10)
        return fall / max(1, self.split_bytes - self.plain_bytes)

    def __str__(self) -> str:
        split, plain = (8 * size / self.weights for size in (self.split_bytes, self.plain_bytes))
        return (
            f"{self.plain_db:.1f} dB to {self.split_db:.1f} dB for {split:.2f} instead of {plain:.2f} bits a "
            f"weight; plain {self.wider_bits} bits take no more and have {self.wider_db:.1f} dB"
        )


@dataclass(frozen=True)
class Limits:
    """What splitting may cost, and must gain.

    Attributes:
        min_gain: dB that a layer's own output must gain.
        bits: stored bits a weight of all candidates together; 0 is no limit.
        work: multiply-adds of all candidates together over those before; 0 is no limit.
    """

    min_gain: float
    bits: float
    work: float


def offers(
    model: ir.Model,
    indices: Mapping[Layer, Array],
    quantizer: Quantizer,
    calibration: Calibration,
    target: Target,
) -> list[Offer]:
    """Measure each layer on calibration data: plain, split, and plain in as many bytes as split.

    Layers that cannot be measured are left out.

    Args:
        model: float model, not changed.
        indices: the part of each weight, by layer.
        quantizer: what is to follow.
        calibration: representative inputs.
        target: where the trial runs.
    """
    by_output = {layer.output.name: index for layer, index in indices.items()}

    def plain(matrix: Array, index: Array) -> Array:
        return quantizer.plain(matrix)[0]

    def split(matrix: Array, index: Array) -> Array:
        return quantizer.split(matrix, index)[0]

    def wider(matrix: Array, index: Array) -> Array:
        size = quantizer.split(matrix, index)[1]
        return quantizer.plain(matrix, quantizer.wider(size, matrix.shape))[0]

    trial = Trial(model)
    for how in (plain, split, wider):
        trial.add(_carrier(by_output, how))
    measured = trial.measure(calibration, target)
    groups: dict[str, list[Layer]] = {}
    for layer in indices:
        groups.setdefault(layer.name, []).append(layer)
    return [
        _offer(name, [(layer, indices[layer]) for layer in layers], quantizer, [it[name] for it in measured])
        for name, layers in groups.items()
        if all(name in result for result in measured)
    ]


def _offer(
    name: str, layers: Sequence[tuple[Layer, Array]], quantizer: Quantizer, measured: Sequence[float]
) -> Offer:
    """Return the offer of all operators of one layer."""
    plain_bytes = split_bytes = work = extra = 0
    bits = []
    for layer, index in layers:
        matrix = matrix_of(layer, layer.weight_array())
        size = quantizer.split(matrix, matrix_of(layer, index))[1]
        plain_bytes += quantizer.plain_bytes(matrix.shape, quantizer.bits)
        split_bytes += size
        bits.append(quantizer.wider(size, matrix.shape))
        work += _work(layer)
        extra += 0 if quantizer.as_codes else _work(layer) * int(index.max())
    plain_db, split_db, wider_db = measured
    return Offer(
        layer=name,
        weights=sum(index.size for _, index in layers),
        plain_db=plain_db,
        split_db=split_db,
        plain_bytes=plain_bytes,
        split_bytes=split_bytes,
        work=work,
        extra_work=extra,
        wider_bits=min(bits),
        wider_db=wider_db,
    )


def _carrier(
    by_output: Mapping[str | None, Array], how: Callable[[Array, Array], Array]
) -> Callable[[Layer], Carried | None]:
    def carry(layer: Layer) -> Carried | None:
        index = by_output.get(layer.output.name)
        if index is None:
            return None
        matrix = how(matrix_of(layer, layer.weight_array()), matrix_of(layer, index))
        held = add_initializer(weight_graph(layer), f"{layer.weight.name}_tried", weight_of(layer, matrix))
        output = emit_branch(layer, layer.input, held, layer.bias, f"{layer.output.name}_tried")
        return Carried(output, held.name or "")

    return carry


def _work(layer: Layer) -> int:
    """Return the multiply-adds of a layer for a row or, where its shape is known, an image; 0 of a table."""
    if layer.kind is LayerKind.EMBEDDING:
        return 0
    size = int(layer.weight_array().size)
    if layer.kind is not LayerKind.CONV or layer.output.shape is None:
        return size
    return size * math.prod(dim for dim in layer.output.shape[2:] if isinstance(dim, int))


def choose(found: Sequence[Offer], limits: Limits) -> tuple[set[str], dict[str, str]]:
    """Return the layers to split, and by layer why the others are not.

    Greedy: what lowers noise to signal most for a byte comes first. Layers are weighed by their relative
    errors, as what an error does to the model's output is not known.
    """
    weights, work = sum(offer.weights for offer in found), sum(offer.work for offer in found)
    held, done = sum(offer.plain_bytes for offer in found), work
    chosen: set[str] = set()
    reasons: dict[str, str] = {}
    for offer in sorted(found, key=lambda offer: -offer.rate):
        size, total = held + offer.split_bytes - offer.plain_bytes, done + offer.extra_work
        if offer.gain_db < limits.min_gain:
            gain = f"splitting gains {offer.gain_db:.1f} dB, below min-gain={limits.min_gain:g}"
            reasons[offer.layer] = f"{gain} ({offer})"
        elif limits.bits and 8 * size > limits.bits * weights:
            reasons[offer.layer] = f"others gain more for a byte of budget={limits.bits:g} bits ({offer})"
        elif limits.work and total > limits.work * work:
            reasons[offer.layer] = f"others gain more for the work of max-work={limits.work:g} ({offer})"
        else:
            chosen.add(offer.layer)
            held, done = size, total
    return chosen, reasons
