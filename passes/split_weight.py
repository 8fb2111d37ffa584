# SPDX-License-Identifier: Apache-2.0
"""A weight as a sum of parts with disjoint supports: which weight goes to which part."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np

from splitfold.passes.clusters import kmeans_thresholds, members
from splitfold.passes.layers import Layer, LayerKind
from splitfold.runtime.feeds import Array

__all__ = ["Partition", "SplitBy", "SplitScope", "matrix_of", "split_parts", "weight_of"]


class SplitBy(enum.Enum):
    """By what weights go to parts."""

    KMEANS = "kmeans"
    """By value, in the intervals of least squared distance to their means (SplitQuant)."""
    QUANTILE = "quantile"
    """By value, in intervals of equally many weights."""
    MAGNITUDE = "magnitude"
    """By magnitude, in shells of least squared distance to their means: bulk and outliers, of both signs."""
    CHANNEL = "channel"
    """Whole input channels, by their largest magnitude: outlier channels apart."""


class SplitScope(enum.Enum):
    """What is clustered together."""

    TENSOR = "tensor"
    """All weights of a layer."""
    CHANNEL = "channel"
    """The weights of each output channel (of a table, each row) alone."""


@dataclass(frozen=True)
class Partition:
    """How weights go to parts.

    Attributes:
        parts: how many there are at most; 2 or more.
        by: by what.
        scope: what is clustered together; channels are clustered over the whole tensor.
    """

    parts: int
    by: SplitBy
    scope: SplitScope

    def index(self, layer: Layer) -> Array:
        """Return the part of each weight, uint8 in the weight's shape, numbered from 0 without gaps.

        There are fewer parts than asked for where the layer has fewer distinct values (or input channels of
        distinct magnitude). Equal values of a cluster are in one part. The weight must be finite.
        """
        if self.by is SplitBy.CHANNEL:
            found = self._channels(layer)
        else:
            found = weight_of(layer, self._values(matrix_of(layer, layer.weight_array())))
        used, numbers = np.unique(found, return_inverse=True)
        return found if len(used) == int(used[-1]) + 1 else numbers.reshape(found.shape).astype(np.uint8)

    def _values(self, matrix: Array) -> Array:
        rows = matrix if self.scope is SplitScope.CHANNEL else matrix.reshape(1, -1)
        rows = np.abs(rows) if self.by is SplitBy.MAGNITUDE else rows
        if self.by is SplitBy.QUANTILE:
            ordered = np.sort(rows, axis=1)
            thresholds = ordered[:, [ordered.shape[1] * part // self.parts for part in range(1, self.parts)]]
        else:
            thresholds = kmeans_thresholds(rows, self.parts)
        return members(rows, thresholds).reshape(matrix.shape)

    def _channels(self, layer: Layer) -> Array:
        weight = np.abs(layer.weight_array())
        axis = input_axis(layer)
        peaks = weight.max(axis=tuple(at for at in range(weight.ndim) if at != axis))[None]
        found = members(peaks, kmeans_thresholds(peaks, self.parts))[0]
        spread = found.reshape([-1 if at == axis else 1 for at in range(weight.ndim)])
        return np.ascontiguousarray(np.broadcast_to(spread, weight.shape))


def input_axis(layer: Layer) -> int:
    """Return the axis of the weight that indexes input channels; of a table, its columns."""
    return 0 if layer.is_linear else 1


def split_parts(weight: Array, index: Array) -> list[Array]:
    """Return the parts of `weight`, each of its shape and dtype, zero where `index` says another part.

    Their sum in any order is `weight`, exactly: each element stands in one part, and the others add zero.
    """
    zero = np.zeros((), weight.dtype)
    return [np.where(index == part, weight, zero) for part in range(int(index.max()) + 1)]


def matrix_of(layer: Layer, array: Array) -> Array:
    """Return an array of the weight's shape as [n, k]: output channels (of a table, its rows) by all that
    they weigh."""
    if layer.is_linear:
        return np.ascontiguousarray(array.T)
    return array if layer.kind is LayerKind.EMBEDDING else array.reshape(len(array), -1)


def weight_of(layer: Layer, matrix: Array) -> Array:
    """Return [n, k] in the shape of the weight: the inverse of `matrix_of`."""
    return np.ascontiguousarray(matrix.T) if layer.is_linear else matrix.reshape(layer.weight_array().shape)
