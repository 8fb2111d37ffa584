# SPDX-License-Identifier: Apache-2.0
"""Graph algorithms: layered drawings, tied groups, meeting points; the only file that imports networkx.

Drawings are after Sugiyama, Tagawa and Toda, "Methods for Visual Understanding of Hierarchical System
Structures", IEEE SMC 11(2), 1981: layers by longest path, few crossings by barycentres, straight edges by
least squares.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import networkx as nx

__all__ = ["Drawing", "draw_layered", "meeting_points", "minimum_cut", "tied_groups"]

T = TypeVar("T", bound=Hashable)

_SWEEPS = 6
_PULLS = 200
_STILL = 0.002
_THIN = 0.35
"""Width of the passage that an edge takes through a layer, in widths of a node."""


@dataclass(frozen=True)
class Drawing:
    """Where the nodes and edges of a graph go.

    Attributes:
        places: (x, y) of node 0, 1, ...: x in widths of a node, from 0; y is the layer, from 0 on top.
        bends: by edge, the points that it passes on its way through layers in between, top to bottom.
        width: largest x.
        layers: number of layers.
    """

    places: tuple[tuple[float, int], ...]
    bends: Mapping[tuple[int, int], tuple[tuple[float, int], ...]]
    width: float
    layers: int


def draw_layered(count: int, edges: Iterable[tuple[int, int]]) -> Drawing:
    """Return a drawing of the acyclic graph of nodes 0 to `count` - 1, every edge pointing down.

    Raises:
        ValueError: the edges make a cycle.
    """
    graph = nx.DiGraph()
    graph.add_nodes_from(range(count))
    graph.add_edges_from((start, end) for start, end in edges if start != end)
    if not nx.is_directed_acyclic_graph(graph):
        raise ValueError("the graph has a cycle: it cannot be drawn in layers.")
    ranks = _ranks(graph)
    rows, passages = _rows(graph, ranks)
    rows = _fewest_crossings(graph, rows)
    x = _straightened(graph, rows)
    left = min(x.values(), default=0.0)
    places = {node: (round(x[node] - left, 3), rank) for rank, row in enumerate(rows) for node in row}
    return Drawing(
        tuple(places[node] for node in range(count)),
        {edge: tuple(places[node] for node in nodes) for edge, nodes in passages.items()},
        max((place[0] for place in places.values()), default=0.0),
        len(rows),
    )


def _ranks(graph: nx.DiGraph) -> dict[int, int]:
    """Return each node's layer: below all it reads, and a node that reads nothing right above its reader."""
    ranks = {node: rank for rank, nodes in enumerate(nx.topological_generations(graph)) for node in nodes}
    for node in graph:
        if not graph.in_degree(node) and graph.out_degree(node):
            ranks[node] = min(ranks[reader] for reader in graph.successors(node)) - 1
    return ranks


def _rows(
    graph: nx.DiGraph, ranks: Mapping[int, int]
) -> tuple[list[list[Hashable]], dict[tuple[int, int], list[Hashable]]]:
    """Return the nodes layer by layer, and the passages that were put into `graph` in place of long edges."""
    passages: dict[tuple[int, int], list[Hashable]] = {}
    for start, end in list(graph.edges):
        between = [("passage", start, end, rank) for rank in range(ranks[start] + 1, ranks[end])]
        if between:
            graph.remove_edge(start, end)
            nx.add_path(graph, [start, *between, end])
            passages[start, end] = list(between)
    rows: list[list[Hashable]] = [[] for _ in range(max(ranks.values(), default=-1) + 1)]
    for node in graph:
        rows[ranks[node] if isinstance(node, int) else node[3]].append(node)
    return rows, passages


def _fewest_crossings(graph: nx.DiGraph, rows: list[list[Hashable]]) -> list[list[Hashable]]:
    """Return the rows, ordered by the mean place of their neighbours above and below in turn, as they cross
    least."""
    best, fewest = rows, _crossings(graph, rows)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        rows = [list(row) for row in rows]
        for rank in range(len(rows)) if down else reversed(range(len(rows))):
            beside = rank - 1 if down else rank + 1
            if 0 <= beside < len(rows):
                rows[rank] = _by_barycentre(graph, rows[rank], rows[beside], down)
        crossings = _crossings(graph, rows)
        if crossings < fewest:
            best, fewest = rows, crossings
    return best


def _neighbours(graph: nx.DiGraph, node: Hashable, above: bool) -> list[Hashable]:
    return list(graph.predecessors(node) if above else graph.successors(node))


def _by_barycentre(
    graph: nx.DiGraph, row: Sequence[Hashable], fixed: Sequence[Hashable], above: bool
) -> list[Hashable]:
    place = {node: index for index, node in enumerate(fixed)}
    own = {node: index for index, node in enumerate(row)}

    def key(node: Hashable) -> float:
        near = [place[other] for other in _neighbours(graph, node, above)]
        return sum(near) / len(near) if near else own[node]

    return sorted(row, key=key)


def _crossings(graph: nx.DiGraph, rows: Sequence[Sequence[Hashable]]) -> int:
    total = 0
    for upper, lower in itertools.pairwise(rows):
        place = {node: index for index, node in enumerate(lower)}
        ends = [sorted(place[end] for end in graph.successors(node) if end in place) for node in upper]
        flat = [end for group in ends for end in group]
        total += sum(a > b for index, a in enumerate(flat) for b in flat[index + 1 :])
    return total


def _straightened(graph: nx.DiGraph, rows: Sequence[Sequence[Hashable]]) -> dict[Hashable, float]:
    """Return x of every node: near its neighbours', in the order of its row, never overlapping."""
    x: dict[Hashable, float] = {}
    for row in rows:
        x |= dict(zip(row, _spread(row, [0.0] * len(row)), strict=True))

    def pull(row: Sequence[Hashable], near: Callable[[Hashable], list[Hashable]]) -> float:
        wished = [sum(x[other] for other in near(node) or [node]) / len(near(node) or [node]) for node in row]
        placed = dict(zip(row, _spread(row, wished), strict=True))
        moved = max(abs(placed[node] - x[node]) for node in row)
        x.update(placed)
        return moved

    for sweep in range(_PULLS):
        order = rows if sweep % 2 == 0 else reversed(rows)
        moved = max([pull(row, lambda node: [*nx.all_neighbors(graph, node)]) for row in order], default=0.0)
        if moved < _STILL:
            break
    for row in rows:  # chains quite straight: under what is read, and what reads nothing above its reader
        pull(row, lambda node: _neighbours(graph, node, above=True))
    for row in reversed(rows):
        pull(row, lambda node: [] if graph.in_degree(node) else _neighbours(graph, node, above=False))
    return x


def _spread(row: Sequence[Hashable], wished: Sequence[float]) -> list[float]:
    """Return the places nearest to those wished for (least squares) that keep order and distance.

    With the distances taken off, this is isotonic regression: pool adjacent violators.
    """
    offsets, at = [], 0.0
    for index, node in enumerate(row):
        if index:
            at += (_room(row[index - 1]) + _room(node)) / 2
        offsets.append(at)
    pools: list[tuple[float, int]] = []
    for wish, offset in zip(wished, offsets, strict=True):
        mean, size = wish - offset, 1
        while pools and pools[-1][0] > mean:
            before, members = pools.pop()
            mean, size = (before * members + mean * size) / (members + size), members + size
        pools.append((mean, size))
    means = [mean for mean, size in pools for _ in range(size)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=True)]


def _room(node: Hashable) -> float:
    return 1.0 if isinstance(node, int) else _THIN


def tied_groups(items: Iterable[T], ties: Iterable[tuple[T, T]]) -> list[set[T]]:
    """Return the connected components of `items` under `ties`, in the order of their first items."""
    graph: nx.Graph = nx.Graph()
    graph.add_nodes_from(items)
    graph.add_edges_from(ties)
    return [set(component) for component in nx.connected_components(graph)]


def minimum_cut(
    apart: Sequence[tuple[float, float]], ties: Mapping[tuple[int, int], float]
) -> tuple[bool, ...]:
    """Return which of two sides each item goes to, at the least total cost: False is the first.

    Args:
        apart: by item, its costs on the first and on the second side; may be negative.
        ties: by pair of items, what it costs that they are on different sides; not negative.

    Raises:
        ValueError: a tie is negative: then no cut is the least cost.
    """
    if any(cost < 0 for cost in ties.values()):
        raise ValueError("a tie has a negative cost.")
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from(["first", "second", *range(len(apart))])
    for item, (first, second) in enumerate(apart):
        least = min(first, second)
        graph.add_edge("first", item, capacity=second - least)  # cut where the item is on the second side
        graph.add_edge(item, "second", capacity=first - least)
    for (one, other), cost in ties.items():
        for start, end in ((one, other), (other, one)):
            known = graph.edges[start, end]["capacity"] if graph.has_edge(start, end) else 0.0
            graph.add_edge(start, end, capacity=known + cost)
    _, (reached, _) = nx.minimum_cut(graph, "first", "second")
    return tuple(item not in reached for item in range(len(apart)))


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
