# SPDX-License-Identifier: Apache-2.0
"""How block-wise weights are written: the forms that a runtime computes them in, and what each stores."""

from __future__ import annotations

import enum

from splitfold.passes.affine import BlockQuantized
from splitfold.passes.dgq import DualGrained
from splitfold.runtime.target import Carrier

__all__ = ["BlockForm", "Expand", "paper_bytes", "stored_bytes"]

_FLOAT = 4


class BlockForm(enum.Enum):
    """How block-wise weights are written."""

    NBITS = "nbits"
    """com.microsoft::MatMulNBits, which names its kernel's accuracy level."""
    QDQ = "qdq"
    """Standard DequantizeLinear with block_size (opset 21), which the runtime fuses to MatMulNBits."""
    INT8_STATIC = "int8-static"
    """Dual-grained weights in one int8 product; activations in uint8, one calibrated range a tensor."""
    INT8_DYNAMIC = "int8-dynamic"
    """The same; one range a tensor and call."""
    INT8_TOKEN = "int8-token"
    """The same; activations symmetric, one range a token and call."""

    @property
    def is_int8(self) -> bool:
        """Whether the layer is computed as one int8 product."""
        return self in (BlockForm.INT8_STATIC, BlockForm.INT8_DYNAMIC, BlockForm.INT8_TOKEN)

    @property
    def carrier(self) -> Carrier:
        """What the target must have."""
        return _CARRIERS[self]


_CARRIERS = {
    BlockForm.NBITS: Carrier.MATMUL_NBITS,
    BlockForm.QDQ: Carrier.BLOCKED_DEQUANTIZE,
    BlockForm.INT8_STATIC: Carrier.INTEGER_MATMUL,
    BlockForm.INT8_DYNAMIC: Carrier.DYNAMIC_INT8,
    BlockForm.INT8_TOKEN: Carrier.INTEGER_MATMUL,
}


class Expand(enum.Enum):
    """When dual-grained weights become int8."""

    LOAD = "load"
    """When the model is opened: the file holds 4-bit codes, whose expansion the runtime folds (opset 21)."""
    OFFLINE = "offline"
    """At compilation: the file holds int8."""


def stored_bytes(weight: BlockQuantized | DualGrained, *, expanded: bool = False) -> int:
    """Return the bytes of codes, scales and zero points, padding included, as they are written.

    Args:
        weight: what is stored.
        expanded: of dual-grained weights: as int8 [K, N] and a float scale a column, else 4-bit codes and
            zero points, int8 steps and the same scales.
    """
    if isinstance(weight, BlockQuantized):
        return _packed(weight.codes.size, weight.bits) + int(weight.scales.nbytes) + _zero_bytes(weight)
    zero_points = weight.scales.size  # of int8, as kernels want them
    if expanded:
        return int(weight.codes.shape[0] * weight.columns + weight.scales.nbytes + zero_points)
    halves = _packed(weight.codes.size, 4) + _packed(weight.zero_points.size, 4)
    return int(halves + weight.steps.nbytes + weight.scales.nbytes + zero_points)


def paper_bytes(weight: DualGrained) -> float:
    """Return the bytes as DGQ counts them: codes and zero points in `bits`, int8 steps, a 16-bit scale a
    channel."""
    small = (weight.codes.shape[0] * weight.columns + weight.zero_points.size) * weight.bits / 8
    return float(small + weight.steps.size + 2 * weight.scales.size)


def _packed(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def _zero_bytes(weight: BlockQuantized) -> int:
    """Return the bytes of packed zero points, whose rows are padded to whole bytes."""
    zeros = weight.zero_points
    return 0 if zeros is None else _packed(zeros.shape[1], weight.bits) * zeros.shape[0]
