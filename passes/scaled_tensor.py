# SPDX-License-Identifier: Apache-2.0
"""A weight times or over its scales that is computed when it is read: folding scales holds no second copy of
the model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitfold.runtime.feeds import Array

__all__ = ["scaled_tensor"]

_SMALL = 1 << 16
"""Bytes up to which the product is held: reading it is cheaper than computing it again."""


@dataclass(frozen=True, eq=False)
class _Scaled:
    source: ir.TensorProtocol
    factor: Array
    divide: bool

    def array(self) -> Array:
        array = np.asarray(self.source.numpy())
        changed = array / self.factor if self.divide else array * self.factor
        return np.asarray(changed.astype(array.dtype), order="C")

    def __call__(self) -> ir.TensorProtocol:
        return ir.Tensor(self.array())


def scaled_tensor(source: ir.TensorProtocol, factor: Array, *, divide: bool = False) -> ir.TensorProtocol:
    """Return `source` x `factor`, or over it, in the dtype and shape of `source`.

    Every read of a large one computes the product anew, bit for bit the same.

    Args:
        source: float tensor.
        factor: float32, broadcasts to the shape of `source`.
        divide: divide instead.
    """
    scaled = _Scaled(source, factor, divide)
    if source.nbytes <= _SMALL:
        return ir.Tensor(scaled.array())
    return ir.LazyTensor(scaled, dtype=source.dtype, shape=ir.Shape(source.shape.numpy()))
