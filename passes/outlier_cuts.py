# SPDX-License-Identifier: Apache-2.0
"""Which channels of a weight to hold apart in more bits, and what that gains over plain weights of one size.

The output error of a weight error e is e^T G e (G = X^T X of the layer's input). A channel is worth what the
error falls by when it leaves: its own, H_kk ||dW_k||^2, which is the sensitivity of OWQ (Lee et al., 2024,
equation 3), and that of its neighbours, whose blocks get a narrower range.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from splitfold.passes.block_grid import BlockGrid, BlockLayout
from splitfold.passes.clip_search import mse_grid
from splitfold.passes.gram_loss import row_losses
from splitfold.runtime.feeds import Array

__all__ = ["Axis", "Cut", "Held", "OutlierScore", "OutputCost", "Split", "cuts", "input_gains", "plain_noise"]

_BLOCKS = (16, 32, 64, 128, 256)
_PLAIN_BITS = (2, 4, 8)
_INDEX = 4
"""Bytes of the number of a channel."""
_OUTPUT_STEP = 8


class Axis(enum.Enum):
    """Which channels stand apart."""

    BEST = "best"
    """Input or output channels, by what they gain."""
    INPUT = "input"
    """Rows of the weight [K, N]."""
    OUTPUT = "output"
    """Columns of the weight [K, N]."""


class OutlierScore(enum.Enum):
    """By what channels are ranked."""

    ERROR = "error"
    """By how far the layer's output error falls when the channel leaves."""
    WEIGHT = "weight"
    """By the channel's largest weight."""
    ACTIVATION = "activation"
    """By the root mean square of what is read (input channels only)."""


@dataclass(frozen=True)
class Held:
    """A format of block-wise weights.

    Attributes:
        bits: 2, 3 (stored in 4), 4 or 8.
        block: columns of [n, k] that share a scale.
        symmetric: whether the zero point is fixed.
        mse: whether ranges are searched by weight error; else each block's whole range counts.
    """

    bits: int
    block: int
    symmetric: bool
    mse: bool

    @property
    def layout(self) -> BlockLayout:
        """How the codes lie."""
        return BlockLayout(4 if self.bits == 3 else self.bits, self.block, self.symmetric, 2**self.bits)

    def grid(self, x: Array) -> BlockGrid:
        """Return the grids of blocks [n, blocks, block]."""
        return mse_grid(x, self.layout) if self.mse else self.layout.grid(x)

    def round_trip(self, matrix: Array) -> Array:
        """Return [n, k] as it comes back, float32."""
        x = self.layout.blocked(matrix)
        return self.grid(x).round_trip(x).reshape(len(matrix), -1)[:, : matrix.shape[1]]

    def nbytes(self, n: int, k: int) -> int:
        """Return the bytes of [n, k] as stored: codes, scales, zero points, padding."""
        layout = self.layout
        blocks = layout.blocks(k)
        zeros = 0 if self.symmetric else -(-blocks * layout.bits // 8)
        return n * (blocks * self.block * layout.bits // 8 + 4 * blocks + zeros)


@dataclass(frozen=True)
class Split:
    """How layers may be split.

    Attributes:
        rest, outliers: formats of the two parts.
        axis: which channels may stand apart.
        by: how they are ranked.
        most: largest part of a layer's channels.
    """

    rest: Held
    outliers: Held
    axis: Axis
    by: OutlierScore
    most: float


@dataclass(frozen=True, eq=False)
class OutputCost:
    """The squared output error of weight errors, and what it is measured against.

    Attributes:
        gram: float32 [k, k], X^T X in any unit; None where nothing is known of the input: all of its channels
            count alike.
    """

    gram: Array | None = None

    def rows(self, errors: Array) -> Array:
        """Return the loss of each row of [n, k]."""
        if self.gram is None:
            return np.asarray(np.square(errors).sum(1))
        return row_losses(np.ascontiguousarray(errors, np.float32), self.gram)

    def total(self, errors: Array) -> float:
        """Return the loss of all rows."""
        return float(self.rows(errors).sum(dtype=np.float64))

    def channels(self, k: int) -> Array:
        """Return by which factor the squared error of each input channel counts, float32 [k]."""
        return np.ones(k, np.float32) if self.gram is None else np.ascontiguousarray(np.diag(self.gram))


@dataclass(frozen=True, eq=False)
class Cut:
    """One way to split a layer.

    Attributes:
        axis: input or output.
        channels: those that stand apart, ascending.
        apart: how many weights they hold.
        nbytes: of both parts and the numbers of the channels.
        weights: of the layer.
        noise, plain: expected output error over the output itself (energies): of this cut, and of plain
            weights of as many bytes.
    """

    axis: Axis
    channels: Array
    apart: int
    nbytes: int
    weights: int
    noise: float
    plain: float

    @property
    def gain_db(self) -> float:
        """How far the error lies below that of plain weights of equal size."""
        return _db(self.plain / self.noise) if self.noise > 0 else float("inf")

    def __str__(self) -> str:
        what = f"{len(self.channels)} {self.axis.value} channels"
        bits = 8 * self.nbytes / self.weights
        return f"{what}: {_db(1 / self.noise):.1f} dB at {bits:.2f} bits, plain {_db(1 / self.plain):.1f} dB"


def _db(ratio: float) -> float:
    return 10 * float(np.log10(ratio))


def cuts(matrix: Array, cost: OutputCost, split: Split) -> list[Cut]:
    """Return the ways to split a weight, from few channels to many; empty where none is left or nothing is
    lost.

    Args:
        matrix: float32 [n, k], the weight transposed; not all zero.
        cost: of its errors.
        split: what is allowed.
    """
    signal = cost.total(matrix)
    n, k = matrix.shape
    if signal <= 0 or cost.total(split.rest.round_trip(matrix) - matrix) <= 0:
        return []
    trials = [*_input_cuts(matrix, cost, split), *_output_cuts(matrix, cost, split)]
    plain = plain_noise(matrix, cost, split.rest, max((trial.nbytes for trial in trials), default=0))
    found = []
    for trial in trials:
        noise = max(trial.loss / signal, float(np.finfo(np.float32).tiny))
        count = len(trial.channels) * (n if trial.axis is Axis.INPUT else k)
        level = plain.at(trial.nbytes)
        found.append(Cut(trial.axis, np.sort(trial.channels), count, trial.nbytes, n * k, noise, level))
    return found


def _counts(step: int, most: int) -> list[int]:
    """Return the numbers of channels that are tried: 1, 2, 3, 4, 6, 8, 12, 16, ... steps."""
    multiples = sorted({2**power for power in range(20)} | {3 * 2**power for power in range(20)})
    return [step * multiple for multiple in multiples if step * multiple <= most]


@dataclass(frozen=True, eq=False)
class _Trial:
    axis: Axis
    channels: Array
    nbytes: int
    loss: float


def _input_cuts(matrix: Array, cost: OutputCost, split: Split) -> Iterator[_Trial]:
    """Yield cuts by input channel, nested, a block of them more each time."""
    n, k = matrix.shape
    step = split.outliers.block
    if split.axis is Axis.OUTPUT:
        return
    rest, chosen = matrix.copy(), np.empty(0, np.int64)
    for count in _counts(step, int(split.most * k)):
        scores = _input_scores(rest, matrix, cost, split)
        scores[chosen] = -np.inf
        new = np.argsort(-scores, kind="stable")[: count - len(chosen)]
        chosen = np.sort(np.concatenate([chosen, new]))
        rest[:, new] = 0
        held = split.rest.round_trip(rest)
        held[:, chosen] = split.outliers.round_trip(np.ascontiguousarray(matrix[:, chosen]))
        nbytes = split.rest.nbytes(n, k) + split.outliers.nbytes(n, count) + _INDEX * count
        yield _Trial(Axis.INPUT, chosen, nbytes, cost.total(held - matrix))


def _input_scores(rest: Array, matrix: Array, cost: OutputCost, split: Split) -> Array:
    if split.by is OutlierScore.WEIGHT:
        return np.asarray(np.abs(matrix).max(0))
    weights = cost.channels(matrix.shape[1])
    if split.by is OutlierScore.ACTIVATION:
        return weights.copy()
    return input_gains(rest, weights, split.rest.layout)


def input_gains(matrix: Array, weights: Array, layout: BlockLayout) -> Array:
    """Return by how far the error falls when one input channel is set to zero: float32 [k].

    Only the channel that a block's range ends at has an effect on its neighbours.

    Args:
        matrix: float32 [n, k].
        weights: float32 [k], by which each channel's squared error counts.
        layout: of the blocks.
    """
    k = matrix.shape[1]
    x = layout.blocked(matrix)
    spread = np.zeros(x.shape[1] * layout.block, np.float32)
    spread[:k] = weights
    spread = spread.reshape(x.shape[1:])

    def errors(part: Array) -> Array:
        return np.asarray(np.square(layout.grid(part).round_trip(part) - part) * spread)

    gains = errors(x)
    whole = gains.sum(-1)
    for end in (x.argmax(-1)[..., None], x.argmin(-1)[..., None]):
        without = x.copy()
        np.put_along_axis(without, end, 0, -1)
        np.put_along_axis(gains, end, (whole - errors(without).sum(-1))[..., None], -1)
    return np.asarray(gains.sum(0).reshape(-1)[:k])


def _output_cuts(matrix: Array, cost: OutputCost, split: Split) -> Iterator[_Trial]:
    """Yield cuts by output channel, whose errors do not depend on each other."""
    n, k = matrix.shape
    if split.axis is Axis.INPUT or split.by is OutlierScore.ACTIVATION or n < _OUTPUT_STEP:
        return
    few = cost.rows(split.rest.round_trip(matrix) - matrix)
    many = cost.rows(split.outliers.round_trip(matrix) - matrix)
    scores = np.abs(matrix).max(1) if split.by is OutlierScore.WEIGHT else few - many
    order = np.argsort(-scores, kind="stable")
    for count in _counts(_OUTPUT_STEP, int(split.most * n)):
        apart, rest = order[:count], order[count:]
        nbytes = split.rest.nbytes(n - count, k) + split.outliers.nbytes(count, k) + _INDEX * n
        loss = float(few[rest].sum(dtype=np.float64) + many[apart].sum(dtype=np.float64))
        yield _Trial(Axis.OUTPUT, apart, nbytes, loss)


@dataclass(frozen=True)
class PlainNoise:
    """The least output error over the output that plain weights reach with so many bytes.

    Attributes:
        points: (bytes, noise), both strictly monotone.
    """

    points: list[tuple[int, float]] = field(default_factory=list)

    def at(self, nbytes: int) -> float:
        """Return the noise of `nbytes`; between two formats, of a mixture: its dB lie on a line."""
        sizes = [size for size, _ in self.points]
        return float(np.exp(np.interp(nbytes, sizes, np.log([noise for _, noise in self.points]))))


def plain_noise(matrix: Array, cost: OutputCost, rest: Held, most: int) -> PlainNoise:
    """Measure plain formats, from the size of `rest` to the first of at least `most` bytes: 2, 4 and 8 bits,
    blocks of 16 to 256, rounded as `rest` is.

    Args:
        matrix: float32 [n, k], not all zero.
        cost: of its errors.
        rest: the format that they are compared with.
        most: bytes.
    """
    n, k = matrix.shape
    signal = cost.total(matrix)
    forms = {rest} | {
        Held(bits, block, rest.symmetric, rest.mse) for bits in _PLAIN_BITS for block in _BLOCKS
    }
    kept, last = PlainNoise(), 0
    for form in sorted(forms, key=lambda form: (form.nbytes(n, k), form.bits)):
        size = form.nbytes(n, k)
        if size < rest.nbytes(n, k):
            continue
        if size > last >= most:
            break
        last = size
        loss = cost.total(form.round_trip(matrix) - matrix) / signal
        noise = max(loss, float(np.finfo(np.float32).tiny))
        if kept.points and kept.points[-1][0] == size:
            noise = min(noise, kept.points.pop()[1])
        if not kept.points or noise < kept.points[-1][1]:
            kept.points.append((size, noise))
    return kept
