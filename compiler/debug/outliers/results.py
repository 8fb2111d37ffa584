# SPDX-License-Identifier: Apache-2.0
"""What the measurement of outliers gives."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["AttentionOutliers", "LayerOutliers", "Outliers"]


@dataclass(frozen=True)
class LayerOutliers:
    """Activations of one layer.

    Attributes:
        layer: its name.
        value: the value that was measured.
        what: "output", with the bias; or "norm input", which residuals add up in.
        infinity_norm: mean over samples of the largest magnitude.
        largest: the largest magnitude of all.
        kurtosis: mean over samples; 3 for a normal distribution.
    """

    layer: str
    value: str
    what: str
    infinity_norm: float
    largest: float
    kurtosis: float


@dataclass(frozen=True)
class AttentionOutliers:
    """Probabilities of one attention block.

    Attributes:
        layer: its name.
        first: share of all probability that goes to the first token.
        heads: the same, a head.
        delimiters: share that goes to delimiter tokens, or None where none were named.
        zeros: share of exact zeros among keys that a query may see.
    """

    layer: str
    first: float
    heads: tuple[float, ...]
    delimiters: float | None
    zeros: float


@dataclass(frozen=True)
class Outliers:
    """What `measure_outliers` found.

    Attributes:
        layers: in order of the graph.
        attention: in order of the graph; blocks that are fused into one operator hold no probabilities.
        samples: samples measured.
        padding: the input whose zeros mark what was left out, or None.
        unseen: attention blocks whose probabilities cannot be seen, and why.
    """

    layers: tuple[LayerOutliers, ...]
    attention: tuple[AttentionOutliers, ...]
    samples: int
    padding: str | None
    unseen: tuple[tuple[str, str], ...]

    @property
    def infinity_norm(self) -> float:
        """The largest infinity norm of any layer."""
        return max((layer.infinity_norm for layer in self.layers), default=0.0)

    @property
    def kurtosis(self) -> float:
        """Mean kurtosis over layers."""
        return float(np.mean([layer.kurtosis for layer in self.layers])) if self.layers else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON."""
        return {
            "infinity_norm": self.infinity_norm,
            "kurtosis": self.kurtosis,
            "samples": self.samples,
            "padding": self.padding,
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "attention": [dataclasses.asdict(block) for block in self.attention],
            "unseen": [list(pair) for pair in self.unseen],
        }

    def by_layer(self) -> dict[str, LayerOutliers]:
        """Return the worst measurement of each layer, by infinity norm, in order."""
        worst: dict[str, LayerOutliers] = {}
        for layer in self.layers:
            if layer.layer not in worst or layer.infinity_norm > worst[layer.layer].infinity_norm:
                worst[layer.layer] = layer
        return worst
