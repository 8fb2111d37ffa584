# SPDX-License-Identifier: Apache-2.0
"""Affine quantization: x is held as codes q with x = (q - zero point) * scale.

Round half to even, as ONNX does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from splitfold.passes.block_grid import BlockGrid, BlockLayout
from splitfold.runtime.feeds import Array

__all__ = [
    "ActivationGrid",
    "BlockQuantized",
    "activation_grid",
    "dequantize_blocks",
    "held_blocks",
    "pack_codes",
    "quantize_blocks",
    "quantize_rows",
    "quantize_weight",
    "unpack_codes",
]

_TINY = np.float32(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class ActivationGrid:
    """A per-tensor grid: `scale` (float32) and `zero_point` (uint8 or int8)."""

    scale: np.float32
    zero_point: np.uint8 | np.int8

    def round_trip(self, values: Array) -> Array:
        """Return `values` (float) as QuantizeLinear and DequantizeLinear give them back, in float32."""
        kind = np.iinfo(self.zero_point.dtype)
        codes = np.clip(
            np.rint(values.astype(np.float32) / self.scale) + float(self.zero_point), kind.min, kind.max
        )
        return np.asarray((codes - float(self.zero_point)) * self.scale, np.float32)


def activation_grid(low: float, high: float, *, symmetric: bool = False) -> ActivationGrid:
    """Return the 8-bit grid for values in [low, high].

    Asymmetric: uint8 0..255, the interval widened to hold zero (ONNX needs an exact zero for padding).
        Symmetric: uint8 with zero point 128,
    which is int8 shifted: the fast kernels want unsigned activations.
    """
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if symmetric:
        scale = max(max(-low, high) / 127.0, float(_TINY))
        return ActivationGrid(np.float32(scale), np.uint8(128))
    scale = max((high - low) / 255.0, float(_TINY))
    return ActivationGrid(np.float32(scale), np.uint8(np.clip(np.rint(-low / scale), 0, 255)))


def quantize_weight(weight: Array, axis: int | None, *, levels: int = 127) -> tuple[Array, Array]:
    """Quantize symmetrically to int8 codes in [-levels, levels].

    Args:
        weight: float array.
        axis: channel axis with one scale each, or None for one scale.
        levels: 127 (8 bits) or 63 (7 bits).

    Returns:
        codes (int8, shape of `weight`) and scales (float32, [channels] or scalar).
    """
    others = tuple(i for i in range(weight.ndim) if i != axis) if axis is not None else None
    peak = np.abs(weight).max(axis=others, initial=0.0).astype(np.float32)
    scale = np.maximum(peak / np.float32(levels), _TINY).astype(np.float32)
    scale = np.where(peak == 0, np.float32(1), scale).astype(np.float32)
    spread = scale if axis is None else scale.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    codes = np.clip(np.rint(weight.astype(np.float32) / spread), -levels, levels).astype(np.int8)
    return codes, scale


def quantize_rows(table: Array) -> tuple[Array, Array]:
    """Quantize each row of a [rows, columns] table symmetrically: int8 codes, float32 scales [rows, 1]."""
    codes, scale = quantize_weight(table, 0)
    return codes, scale.reshape(-1, 1)


@dataclass(frozen=True)
class BlockQuantized:
    """A matrix quantized in blocks along its rows.

    Attributes:
        codes: uint8 [n, blocks, block], each below 2**bits; the last block is padded with the zero point.
        scales: float32 [n, blocks].
        zero_points: uint8 [n, blocks], or None where it is 2**(bits-1) throughout.
        bits: width of a code as stored.
        columns: columns before padding.
    """

    codes: Array
    scales: Array
    zero_points: Array | None
    bits: int
    columns: int


def quantize_blocks(
    matrix: Array, *, bits: int, block: int, symmetric: bool, levels: int | None = None
) -> BlockQuantized:
    """Round [n, k] to the nearest codes, one scale (and zero point) for each `block` consecutive columns of a
    row.

    Args:
        matrix: float [n, k]; k is padded to a multiple of `block`.
        bits: width of a stored code, 2, 4 or 8.
        block: columns that share a scale.
        symmetric: one fixed zero point 2**(bits-1); else the block's own range (widened to hold zero) gives
            it.
        levels: number of distinct codes, at most 2**bits; 8 codes in 4 bits is a 3-bit weight.
    """
    layout = BlockLayout(bits, block, symmetric, levels or 2**bits)
    x = layout.blocked(matrix)
    grid = layout.grid(x)
    return held_blocks(grid.codes(x), grid, layout, columns=matrix.shape[1])


def held_blocks(codes: Array, grid: BlockGrid, layout: BlockLayout, *, columns: int) -> BlockQuantized:
    """Return whole-numbered `codes` [n, blocks, block] on `grid` as they are stored."""
    zeros = None if layout.symmetric else grid.zeros.astype(np.uint8)
    return BlockQuantized(codes.astype(np.uint8), grid.scales, zeros, layout.bits, columns)


def dequantize_blocks(quantized: BlockQuantized) -> Array:
    """Return float32 [n, columns]: (code - zero point) * scale."""
    zero = (
        quantized.zero_points
        if quantized.zero_points is not None
        else np.full_like(quantized.scales, 2 ** (quantized.bits - 1))
    )
    x = (quantized.codes.astype(np.float32) - zero.astype(np.float32)[..., None]) * quantized.scales[
        ..., None
    ]
    return x.reshape(x.shape[0], -1)[:, : quantized.columns].astype(np.float32)


def pack_codes(codes: Array, bits: int) -> Array:
    """Pack the last axis of uint8 codes, the first code in the lowest bits; an incomplete byte is filled with
    zero."""
    per_byte = 8 // bits
    length = codes.shape[-1]
    padded = np.zeros((*codes.shape[:-1], -(-length // per_byte) * per_byte), np.uint8)
    padded[..., :length] = codes
    parts = padded.reshape(*codes.shape[:-1], -1, per_byte)
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    return np.asarray(np.bitwise_or.reduce(parts << shifts, axis=-1), np.uint8)


def unpack_codes(packed: Array, bits: int, length: int) -> Array:
    """Return the first `length` codes of the last axis: the inverse of `pack_codes`."""
    per_byte = 8 // bits
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    parts = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return np.asarray(parts.reshape(*packed.shape[:-1], -1)[..., :length], np.uint8)
