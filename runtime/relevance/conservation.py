# SPDX-License-Identifier: Apache-2.0
"""Where relevance went: what each operator passed on, what constants kept, and what was lost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Balance", "Flow", "by_layer"]


@dataclass(frozen=True)
class Flow:
    """What went through one operator, or through the operators of one layer.

    Attributes:
        name: of the node, or the layer.
        operator: ONNX operator type, or several joined by +.
        layer: user-facing layer.
        received: sum of the relevance of its outputs.
        passed: sum of what its inputs got.
        absorbed: what constants kept: biases, and the constant term of a softmax's expansion.
    """

    name: str
    operator: str
    layer: str
    received: float
    passed: float
    absorbed: float

    @property
    def lost(self) -> float:
        """What neither inputs nor constants got: the rule's own defect and rounding."""
        return self.received - self.passed - self.absorbed


@dataclass(frozen=True)
class Balance:
    """Where the relevance of a batch went.

    Attributes:
        started: its sum at the outputs.
        sources: its sum by where activations begin: ``input``, ``embedding``.
        flows: by operator, from the outputs to the inputs.
    """

    started: float
    sources: Mapping[str, float]
    flows: tuple[Flow, ...]

    @property
    def arrived(self) -> float:
        """What reached inputs and embeddings."""
        return math.fsum(self.sources.values())

    @property
    def absorbed(self) -> float:
        """What constants kept."""
        return math.fsum(flow.absorbed for flow in self.flows)

    @property
    def lost(self) -> float:
        """What was neither passed on nor absorbed, all operators together."""
        return self.started - self.arrived - self.absorbed

    @property
    def lost_share(self) -> float:
        """`lost` over what started, without sign; 0 where nothing started."""
        return abs(self.lost / self.started) if self.started else 0.0


def by_layer(balance: Balance) -> tuple[Flow, ...]:
    """Return the flow through each layer: the operators of one name together, in the order of the walk. What
    the operators of a layer pass to each other counts as received and passed."""
    found: dict[str, list[Flow]] = {}
    for flow in balance.flows:
        found.setdefault(flow.layer, []).append(flow)
    return tuple(
        Flow(
            layer,
            "+".join(dict.fromkeys(flow.operator for flow in flows)),
            layer,
            math.fsum(flow.received for flow in flows),
            math.fsum(flow.passed for flow in flows),
            math.fsum(flow.absorbed for flow in flows),
        )
        for layer, flows in found.items()
    )
