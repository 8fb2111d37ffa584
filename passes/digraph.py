# SPDX-License-Identifier: Apache-2.0
"""Graph algorithms; the only file that imports networkx."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import networkx as nx

__all__ = ["meeting_points", "tied_groups"]

T = TypeVar("T", bound=Hashable)


def tied_groups(items: Iterable[T], ties: Iterable[tuple[T, T]]) -> list[set[T]]:
    """Return the connected components of `items` under `ties`, in the order of their first items."""
    graph: nx.Graph = nx.Graph()
    graph.add_nodes_from(items)
    graph.add_edges_from(ties)
    return [set(component) for component in nx.connected_components(graph)]


def meeting_points(
    successors: Mapping[T, Iterable[T | None]], starts: Sequence[Collection[T]]
) -> list[T | None]:
    """Return, for each set of starts, the first node that every path from any of them to the end of the graph
    runs through (their common post-dominator), or None where only the end itself does.

    A follower that is None is the end; so is a node's only follower where it has none. A single start meets
    at itself.
    """
    end = object()
    graph: nx.DiGraph = nx.DiGraph()
    for node, followers in successors.items():
        after = [end if follower is None else follower for follower in followers] or [end]
        graph.add_edges_from((other, node) for other in after)
    parents = nx.immediate_dominators(graph, end)
    return [_meeting(parents, end, list(chosen)) for chosen in starts]


def _meeting(parents: Mapping[object, object], end: object, starts: Sequence[T]) -> T | None:
    chains = [_chain(parents, end, start) for start in starts]
    others = [set(chain) for chain in chains[1:]]
    for node in chains[0]:
        if node is not end and all(node in chain for chain in others):
            return node  # type: ignore[return-value]
    return None


def _chain(parents: Mapping[object, object], end: object, start: object) -> list[object]:
    chain = [start]
    while chain[-1] is not end and chain[-1] in parents and parents[chain[-1]] is not None:
        chain.append(parents[chain[-1]])
        if chain[-1] is chain[-2]:
            break
    return chain
