# SPDX-License-Identifier: Apache-2.0
"""Trial: the local error of low-bit layers, each fed with the float model's own activations, before anything is replaced.

A copy of the model computes each layer twice, as it is and in low precision, and the two outputs are compared over calibration data. So
the error is the layer's own and not what came before it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitfold.passes.carriers import Carried
from splitfold.passes.layers import Layer, find_layers
from splitfold.passes.values import forget_names
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.feeds import Array
from splitfold.runtime.session import Optimization, Session
from splitfold.runtime.target import Target

__all__ = ["local_sqnr"]

_BATCHES = 4
"""Batches that a trial looks at: the error of a layer needs far fewer samples than its range."""


@dataclass
class _Power:
    signal: float = 0.0
    noise: float = 0.0

    def add(self, reference: Array, actual: Array) -> None:
        x = reference.astype(np.float64)
        self.signal += float(np.vdot(x, x))
        difference = actual.astype(np.float64) - x
        self.noise += float(np.vdot(difference, difference))

    def sqnr_db(self) -> float:
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


def local_sqnr(
    model: ir.Model, carry: Callable[[Layer], Carried | None], calibration: Calibration, target: Target
) -> Mapping[str, float]:
    """Return, by layer name, the SQNR in dB of each layer's low-bit output against its float output.

    Args:
        model: float model; it is not changed.
        carry: emits the low-bit form of a layer of the copy, or returns None for a layer that is not tried.
        calibration: representative inputs; the first four batches are used.
        target: where the trial runs.
    """
    copy = model.clone()
    forget_names(copy)
    pairs: dict[str, tuple[str, str]] = {}
    for layer in find_layers(copy)[0]:
        if not layer.in_subgraph and (carried := carry(layer)) is not None:
            pairs[layer.name] = (layer.output.name or "", carried.output.name or "")
    if not pairs:
        return {}
    taps = list(dict.fromkeys(itertools.chain.from_iterable(pairs.values())))
    session = Session(copy, target, optimization=Optimization.ALL, taps=taps)
    powers = {name: _Power() for name in pairs}
    for feeds in itertools.islice(calibration, _BATCHES):
        results = session.run(feeds, taps)
        for name, (reference, actual) in pairs.items():
            powers[name].add(results[reference], results[actual])
    return {name: power.sqnr_db() for name, power in powers.items()}
