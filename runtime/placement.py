# SPDX-License-Identifier: Apache-2.0
"""Placement: which execution provider runs each node of an opened model, as ONNX Runtime divided it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["PlacedNode", "Placement"]

_NAMED = 20
"""Nodes on the CPU provider that the manifest names; more are counted."""


@dataclass(frozen=True)
class PlacedNode:
    """A node of the graph as the provider got it: after the runtime's own basic rewrites.

    Attributes:
        name: of the node; may be empty.
        operator: its type, with its domain where that is not ONNX's own: ``com.microsoft::FastGelu``.
    """

    name: str
    operator: str

    def __str__(self) -> str:
        return f"{self.operator} '{self.name}'"


@dataclass(frozen=True)
class Placement:
    """Which provider runs what.

    Attributes:
        provider: the one that was asked for.
        nodes: by provider, the nodes it runs.
        parts: pieces that the provider asked for compiles; arrays are handed over between them.
    """

    provider: str
    nodes: Mapping[str, tuple[PlacedNode, ...]]
    parts: int

    @property
    def left(self) -> tuple[PlacedNode, ...]:
        """The nodes that another provider runs than the one asked for."""
        return tuple(node for name, nodes in self.nodes.items() if name != self.provider for node in nodes)

    @property
    def count(self) -> int:
        """How many nodes there are."""
        return sum(map(len, self.nodes.values()))

    def __str__(self) -> str:
        """Such as ``6 of 139 nodes run on the CPU provider, not on OpenVINO: 6 Attention``."""
        short = self.provider.removesuffix("ExecutionProvider")
        if not self.left:
            return f"all {self.count} nodes run on {short}"
        kinds = Counter(node.operator for node in self.left).most_common()
        listed = ", ".join(f"{count} {operator}" for operator, count in kinds)
        return f"{len(self.left)} of {self.count} nodes run on the CPU provider, not on {short}: {listed}"

    def values(self) -> dict[str, Any]:
        """Return the placement as plain JSON values: counts by provider, and the nodes left over by name."""
        named = [str(node) for node in self.left[:_NAMED]]
        more = len(self.left) - len(named)
        return {
            "provider": self.provider,
            "nodes": {name: len(nodes) for name, nodes in sorted(self.nodes.items())},
            "parts": self.parts,
            "left": [*named, f"and {more} more"] if more else named,
        }
