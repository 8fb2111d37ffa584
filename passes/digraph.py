# SPDX-License-Identifier: Apache-2.0
"""Graph algorithms; the only file that imports networkx."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TypeVar

import networkx as nx

__all__ = ["tied_groups"]

T = TypeVar("T", bound=Hashable)


def tied_groups(items: Iterable[T], ties: Iterable[tuple[T, T]]) -> list[set[T]]:
    """Return the connected components of `items` under `ties`, in the order of their first items."""
    graph: nx.Graph = nx.Graph()
    graph.add_nodes_from(items)
    graph.add_edges_from(ties)
    return [set(component) for component in nx.connected_components(graph)]
