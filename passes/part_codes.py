# SPDX-License-Identifier: Apache-2.0
"""The parts of a weight in few bits, held as one code a weight: which part it is in, and which level there.

A weight is in one part, so its code needs log2(parts x 2^bits) bits, not the parts x bits of as many layers.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np

from splitfold.passes.block_grid import BlockLayout
from splitfold.runtime.feeds import Array

__all__ = ["Grain", "Grouping", "PartCodes", "PartGrid", "code_parts"]

_HALF_RANGE = (2.0**-18, 60000.0)
"""Scales that float16 holds well enough: within 2 % at the low end, where it has 6 bits left."""
_FARTHEST = 2048.0
"""Steps between zero and the end of a grid: more, and float16 rounds its zero point by a step."""


class Grain(enum.Enum):
    """Which weights of a part share a grid."""

    TENSOR = "tensor"
    """All."""
    CHANNEL = "channel"
    """Those of an output channel (of a table, a row)."""
    BLOCK = "block"
    """Those of a block of an output channel."""


class PartGrid(enum.Enum):
    """Which interval a part's grid covers."""

    ZERO = "zero"
    """That of its weights and zero: what parallel layers need, where zeros fill the place of other parts."""
    OWN = "own"
    """That of its weights alone."""


@dataclass(frozen=True)
class Grouping:
    """How the weights [n, k] of a layer are grouped.

    Attributes:
        grain: which share a grid.
        block: of BLOCK: weights of a row in a group, the last group padded.
    """

    grain: Grain
    block: int

    def grouped(self, matrix: Array, fill: float) -> Array:
        """Return [n, k] as [rows, groups, m], padded with `fill`."""
        if self.grain is Grain.TENSOR:
            return matrix.reshape(1, 1, -1)
        n, k = matrix.shape
        if self.grain is Grain.CHANNEL:
            return matrix.reshape(n, 1, k)
        groups = -(-k // self.block)
        padded = np.full((n, groups * self.block), fill, matrix.dtype)
        padded[:, :k] = matrix
        return padded.reshape(n, groups, self.block)


@dataclass(frozen=True)
class PartCodes:
    """A weight [n, k] as codes: code c is level c % levels of part c // levels, and stands for (level - zero)
    * scale of that part and group.

    Attributes:
        codes: uint8 or uint16 [rows, groups, m].
        scales: float32 or float16 [rows, groups, parts].
        zeros: uint8 (on grids that hold zero), float16 or float32, of the shape of `scales`.
        levels: of each part, 2^bits.
        shape: n and k.
    """

    codes: Array
    scales: Array
    zeros: Array
    levels: int
    shape: tuple[int, int]

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return int(self.scales.shape[2])

    @property
    def code_bits(self) -> int:
        """Width of a stored code: 4, 8 or 16 bits, the least type that ONNX has."""
        needed = (self.parts * self.levels - 1).bit_length()
        return next(width for width in (4, 8, 16) if needed <= width)

    def table(self) -> Array:
        """Return what the codes of each group stand for, float32 [rows, groups, parts x levels]."""
        steps = np.arange(self.levels, dtype=np.float32) - self.zeros.astype(np.float32)[..., None]
        values = steps * self.scales.astype(np.float32)[..., None]
        return np.asarray(values.reshape(*self.scales.shape[:2], -1))

    def values(self) -> Array:
        """Return the weight that the codes stand for, float32 [n, k]."""
        x = np.take_along_axis(self.table(), self.codes.astype(np.int64), axis=2)
        n, k = self.shape
        return np.ascontiguousarray(x.reshape(n, -1)[:, :k])

    def stored_bytes(self, code_bits: int | None = None) -> int:
        """Return the bytes of codes, scales and zero points, padding included."""
        codes = -(-self.codes.size * (code_bits or self.code_bits) // 8)
        return int(codes + self.scales.nbytes + self.zeros.nbytes)

    def own_codes(self) -> Array:
        """Return the codes of the weights alone, without padding, [n, k]."""
        n, k = self.shape
        return self.codes.reshape(n, -1)[:, :k]


def code_parts(
    matrix: Array, index: Array, grouping: Grouping, *, bits: int, symmetric: bool, grid: PartGrid
) -> PartCodes:
    """Round a weight to the nearest codes of its parts' grids.

    On grids that hold zero the result is the sum of the parts' own round trips, as block-wise layers would
    compute them, bit for bit.

    Args:
        matrix: float [n, k].
        index: part of each weight, [n, k], from 0 without gaps.
        grouping: which weights share a grid.
        bits: a level's; each part has 2^bits levels.
        symmetric: of grids that hold zero: fix the zero point in the middle.
        grid: which interval is covered.
    """
    x = grouping.grouped(np.asarray(matrix, np.float32), 0)
    members = grouping.grouped(index.astype(np.int16), -1)
    levels, found = 2**bits, []
    for part in range(int(index.max()) + 1):
        inside = members == part
        if grid is PartGrid.OWN:
            found.append(_own_grid(x, inside, levels))
        else:
            layout = BlockLayout(bits, x.shape[2], symmetric, levels)
            zero_grid = layout.grid(np.where(inside, x, 0))
            found.append((zero_grid.scales, zero_grid.zeros.astype(np.uint8), zero_grid.codes(x)))
    scales = np.stack([item[0] for item in found], axis=2)
    zeros = np.stack([item[1] for item in found], axis=2)
    if grid is PartGrid.OWN:
        scales, zeros, found = _narrowed(x, scales, zeros, found, levels)
    codes = np.zeros(x.shape, np.uint16)
    for part, (_, _, level) in enumerate(found):
        np.copyto(codes, (level + part * levels).astype(np.uint16), where=members == part)
    kind = np.uint8 if len(found) * levels <= 256 else np.uint16
    return PartCodes(codes.astype(kind), scales, zeros, levels, (matrix.shape[0], matrix.shape[1]))


def _own_grid(x: Array, inside: Array, levels: int) -> tuple[Array, Array, Array]:
    """Return scales, zero points and codes of the interval that the members of each group span."""
    low = np.where(inside, x, np.inf).min(axis=2)
    high = np.where(inside, x, -np.inf).max(axis=2)
    low, high = (np.where(inside.any(axis=2), end, 0).astype(np.float32) for end in (low, high))
    far = np.maximum(np.abs(low), np.abs(high)) / np.float32(_FARTHEST)
    scales = np.maximum((high - low) / np.float32(levels - 1), far)
    single = high == low  # one value: it is one step from zero, exactly
    scales = np.where(single, np.where(low == 0, 1, np.abs(low)), scales).astype(np.float32)
    return scales, *_on(x, scales, low, levels)


def _on(x: Array, scales: Array, low: Array, levels: int) -> tuple[Array, Array]:
    zeros = np.asarray(-low / scales, np.float32)
    return zeros, np.clip(np.rint(x / scales[..., None] + zeros[..., None]), 0, levels - 1)


_Found = list[tuple[Array, Array, Array]]


def _narrowed(
    x: Array, scales: Array, zeros: Array, found: _Found, levels: int
) -> tuple[Array, Array, _Found]:
    """Return scales and zero points in float16 where it holds them, and the codes for these."""
    if scales.min() < _HALF_RANGE[0] or max(scales.max(), np.abs(zeros).max()) > _HALF_RANGE[1]:
        return scales, zeros, found
    half_scales = scales.astype(np.float16)
    short = half_scales.astype(np.float32) < scales
    half_scales = np.where(short, np.nextafter(half_scales, np.float16(np.inf)), half_scales)
    half_zeros = (zeros * (scales / half_scales.astype(np.float32))).astype(np.float16)
    codes: _Found = []
    for part in range(scales.shape[2]):
        step, zero = (item[:, :, part, None].astype(np.float32) for item in (half_scales, half_zeros))
        level = np.clip(np.rint(x / step + zero), 0, levels - 1)
        codes.append((half_scales[..., part], half_zeros[..., part], level))
    return half_scales, half_zeros, codes
