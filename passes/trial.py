# SPDX-License-Identifier: Apache-2.0
"""Trial: the local error of low-bit layers, each fed with the float model's own activations, before anything
is replaced.

A copy of the model computes each layer as it is and in one or more low-bit ways, and the outputs are compared
over calibration data. So the error is the layer's own and not what came before it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

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

__all__ = ["Trial", "local_sqnr"]

_LEAST_NOISE = 1e-12
"""Noise to signal below which a row counts as exact (120 dB)."""
_BATCHES = 4
"""Batches that a trial looks at: the error of a layer needs far fewer samples than its range."""

Carry = Callable[[Layer], Carried | None]
Results = Mapping[str, Array]
Rows = tuple[Array, Array]
"""Float outputs, float64 [rows, n], and their squared norms [rows]."""


@dataclass
class _Decibels:
    """Mean over rows of 10 log10(signal / noise): a few rows of great energy must not hide the error of all
    others."""

    total: float = 0.0
    rows: int = 0

    def add(self, reference: Rows, actual: Array) -> None:
        rows, signal = reference
        difference = actual.reshape(rows.shape) - rows
        noise = np.einsum("ij,ij->i", difference, difference)
        alive = signal > 0
        ratio = signal[alive] / np.maximum(noise[alive], signal[alive] * _LEAST_NOISE)
        self.total += float(np.log10(ratio).sum()) * 10
        self.rows += int(alive.sum())

    def mean(self) -> float:
        return self.total / self.rows if self.rows else math.inf


@dataclass
class _Tried:
    """A layer in one way: the names of its branches' outputs, in float and in low precision.

    Attributes:
        by_token: whether a row is a token (all axes but the last), else a sample (the first axis).
        axis: along which the branches' outputs are concatenated; None where they are summed.
    """

    by_token: bool
    axis: int | None = None
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    noise: _Decibels = field(default_factory=_Decibels)

    def reference(self, results: Results) -> Rows:
        whole = _joined([results[name] for name in self.before], self.axis)
        axes = whole.ndim - 1 if self.by_token else min(1, whole.ndim)
        rows = whole.astype(np.float64).reshape(math.prod(whole.shape[:axes]), -1)
        return rows, np.einsum("ij,ij->i", rows, rows)

    def add(self, reference: Rows, results: Results) -> None:
        self.noise.add(reference, _joined([results[name] for name in self.after], self.axis))


class Trial:
    """A copy of a model in which layers are computed also in low precision, in one way or more.

    Attributes:
        model: the copy. Between two ways it may be rewritten as long as each layer's output stays what it is.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model.clone()
        forget_names(self.model)
        self._layers = [layer for layer in find_layers(self.model)[0] if not layer.in_subgraph]
        self._ways: list[dict[str, _Tried]] = []

    @property
    def layers(self) -> list[Layer]:
        """The layers of the copy as they stand now, but for those of subgraphs."""
        return [layer.current() for layer in self._layers]

    def add(self, carry: Carry) -> None:
        """Add a way: `carry` emits the low-bit form of a layer of the copy, or returns None for a layer that
        is not tried."""
        way: dict[str, _Tried] = {}
        for layer in self.layers:
            if (carried := carry(layer)) is None:
                continue
            marks = branch_of_node(layer.node)
            if layer.name not in way or not marks:
                way[layer.name] = _Tried(layer.is_linear)
            tried = way[layer.name]
            tried.before.append(layer.output.name or "")
            tried.after.append(carried.output.name or "")
            if any(mark.kind.is_joined for mark in marks):
                tried.axis = -1 if layer.is_linear else 1
        self._ways.append(way)

    def measure(self, calibration: Calibration, target: Target) -> list[Mapping[str, float]]:
        """Return the SQNR in dB by layer name, way by way; see `local_sqnr`."""
        tried = [item for way in self._ways for item in way.values()]
        taps = list(dict.fromkeys(name for item in tried for name in (*item.before, *item.after)))
        if taps:
            session = Session(self.model, target, optimization=Optimization.ALL, taps=taps)
            for feeds in itertools.islice(calibration, _BATCHES):
                self._compare(session.run(feeds, taps))
        return [{name: item.noise.mean() for name, item in way.items()} for way in self._ways]

    def _compare(self, results: Results) -> None:
        for name in dict.fromkeys(name for way in self._ways for name in way):
            found = [way[name] for way in self._ways if name in way]
            rows = {tuple(item.before): item for item in found}
            references = {names: item.reference(results) for names, item in rows.items()}
            for item in found:
                item.add(references[tuple(item.before)], results)


def local_sqnr(
    model: ir.Model, carry: Carry, calibration: Calibration, target: Target
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
    trial = Trial(model)
    trial.add(carry)
    return trial.measure(calibration, target)[0]


def _joined(arrays: Sequence[Array], axis: int | None) -> Array:
    """Return the output of a layer from those of its branches: concatenated along `axis`, or summed."""
    if len(arrays) == 1:
        return arrays[0]
    return np.asarray(
        np.sum(arrays, axis=0, dtype=np.float64) if axis is None else np.concatenate(arrays, axis)
    )
