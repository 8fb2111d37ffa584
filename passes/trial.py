# SPDX-License-Identifier: Apache-2.0
"""Trial: the local error of low-bit layers, each fed with the float model's own activations, before anything
is replaced.

A copy of the model computes each layer twice, as it is and in low precision, and the two outputs are compared
over calibration data. So the error is the layer's own and not what came before it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitfold.passes.branches import branch_of_node
from splitfold.passes.carriers import Carried
from splitfold.passes.layers import Layer, find_layers
from splitfold.passes.values import forget_names
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.feeds import Array
from splitfold.runtime.session import Optimization, Session
from splitfold.runtime.target import Target

__all__ = ["local_sqnr"]

_LEAST_NOISE = 1e-12
"""Noise to signal below which a row counts as exact (120 dB)."""
_BATCHES = 4
"""Batches that a trial looks at: the error of a layer needs far fewer samples than its range."""


@dataclass
class _Decibels:
    """Mean over rows of 10 log10(signal / noise): a few rows of great energy must not hide the error of all
    others."""

    total: float = 0.0
    rows: int = 0

    def add(self, reference: Array, actual: Array, *, row_axes: int) -> None:
        x = reference.astype(np.float64).reshape(math.prod(reference.shape[:row_axes]), -1)
        noise = np.square(actual.astype(np.float64).reshape(x.shape) - x).sum(1)
        signal = np.square(x).sum(1)
        alive = signal > 0
        ratio = signal[alive] / np.maximum(noise[alive], signal[alive] * _LEAST_NOISE)
        self.total += float(np.log10(ratio).sum()) * 10
        self.rows += int(alive.sum())

    def mean(self) -> float:
        return self.total / self.rows if self.rows else math.inf


def local_sqnr(
    model: ir.Model, carry: Callable[[Layer], Carried | None], calibration: Calibration, target: Target
) -> Mapping[str, float]:
    """Return, by layer name, the SQNR in dB of each layer's low-bit output against its float output.

    It is the mean over rows: tokens (all axes but the last) of a linear layer, samples (the first axis)
        of a convolution. The branches of one layer are measured together: their outputs are joined.

    Args:
        model: float model; it is not changed.
        carry: emits the low-bit form of a layer of the copy, or returns None for a layer that is not tried.
        calibration: representative inputs; the first four batches are used.
        target: where the trial runs.
    """
    copy = model.clone()
    forget_names(copy)
    pairs: dict[str, list[tuple[str, str]]] = {}
    linear: set[str] = set()
    sliced: dict[str, int] = {}
    for layer in find_layers(copy)[0]:
        if not layer.in_subgraph and (carried := carry(layer)) is not None:
            marks = branch_of_node(layer.node)
            earlier = pairs.get(layer.name, []) if marks else []
            pairs[layer.name] = [*earlier, (layer.output.name or "", carried.output.name or "")]
            linear |= {layer.name} if layer.is_linear else set()
            if any(mark.kind.is_joined for mark in marks):
                sliced[layer.name] = -1 if layer.is_linear else 1
    if not pairs:
        return {}
    taps = list(dict.fromkeys(name for found in pairs.values() for pair in found for name in pair))
    session = Session(copy, target, optimization=Optimization.ALL, taps=taps)
    sums = {name: _Decibels() for name in pairs}
    for feeds in itertools.islice(calibration, _BATCHES):
        results = session.run(feeds, taps)
        for name, found in pairs.items():
            reference, actual = (
                _joined([results[pair[side]] for pair in found], sliced.get(name)) for side in (0, 1)
            )
            rank = reference.ndim
            sums[name].add(reference, actual, row_axes=rank - 1 if name in linear else min(1, rank))
    return {name: item.mean() for name, item in sums.items()}


def _joined(arrays: Sequence[Array], axis: int | None) -> Array:
    """Return the output of a layer from those of its branches: concatenated along `axis`, or summed."""
    if len(arrays) == 1:
        return arrays[0]
    return np.asarray(
        np.sum(arrays, axis=0, dtype=np.float64) if axis is None else np.concatenate(arrays, axis)
    )
