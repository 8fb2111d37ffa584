# SPDX-License-Identifier: Apache-2.0
"""The graph around each layer, before and after, drawn in layers; compact, as a report carries all of them.

The JSON that comes out::

    {"texts": [...],                                  texts that the rest refers to by number
     "sides": [{"nodes": [[operator, detail, kernel, state, [layer, ...]], ...],
                "edges": [[from, to, label], ...]}, ...],       before, after
     "drawings": [{"width": w, "rows": r, "places": [x, y, ...], "edges": [[from, to, x, y, ...], ...]}, ...],
     "views": [[[drawing, [node, ...], left out], ...] or null, ...]}   by layer: before, after
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from splitfold.compiler.debug.report.side import Side
from splitfold.passes.digraph import draw_layered
from splitfold.passes.identity import display_layer, layers_of

__all__ = ["graph_json"]

_MOST = 48
"""Nodes of one picture; what is further from the layer's first node is left out."""
_FEW = 7
"""Nodes below which the neighbours' neighbours are shown too."""


class _State(enum.IntEnum):
    KEPT = 0
    CHANGED = 1
    """In the other model there is no such node: it was replaced, or is new."""


@dataclass
class _Texts:
    """Texts by number, each once."""

    known: dict[str, int] = field(default_factory=dict)

    def of(self, text: str) -> int:
        return self.known.setdefault(text, len(self.known))


@dataclass
class _Drawings:
    """Drawings by number, each once: the blocks of a transformer share one."""

    known: dict[tuple[int, tuple[tuple[int, int], ...]], int] = field(default_factory=dict)
    made: list[dict[str, Any]] = field(default_factory=list)

    def of(self, count: int, edges: Sequence[tuple[int, int]]) -> int:
        key = (count, tuple(edges))
        if key not in self.known:
            self.known[key] = len(self.made)
            self.made.append(_drawing(count, edges))
        return self.known[key]


def graph_json(before: Side, after: Side, layers: Sequence[str]) -> dict[str, Any]:
    """Return the graph around each of `layers` as JSON values; see the module."""
    texts, drawings = _Texts(), _Drawings()
    index = {layer: position for position, layer in enumerate(layers)}
    sides = [_Indexed(side, other) for side, other in ((before, after), (after, before))]
    return {
        "sides": [side.json(texts, index) for side in sides],
        "views": [[side.view(layer, drawings) for side in sides] for layer in layers],
        "drawings": drawings.made,
        "texts": list(texts.known),
    }


class _Indexed:
    """A model's nodes by number, in order of execution, with the edges between them."""

    def __init__(self, side: Side, other: Side) -> None:
        self._side = side
        self._nodes = [node for graph in side.model.graphs() for node in graph]
        self._number = {node: number for number, node in enumerate(self._nodes)}
        self._there = {_signature(node) for graph in other.model.graphs() for node in graph}
        self._edges = {
            (self._number[maker], number): value
            for number, node in enumerate(self._nodes)
            for value in node.inputs
            if value is not None and (maker := value.producer()) in self._number and maker is not None
        }
        self._near: dict[int, list[int]] = {}
        for start, end in self._edges:
            self._near.setdefault(start, []).append(end)
            self._near.setdefault(end, []).append(start)

    def json(self, texts: _Texts, index: Mapping[str, int]) -> dict[str, Any]:
        made_by = self._side.made_by
        nodes = []
        for node in self._nodes:
            kernels = [kernel for value in node.outputs if (kernel := made_by.get(value.name or ""))]
            layers = [index[layer] for layer in layers_of(node) or (display_layer(node),) if layer in index]
            state = _State.KEPT if _signature(node) in self._there else _State.CHANGED
            words = (node.op_type, _detail(node), kernels[0] if kernels else "")
            nodes.append([*map(texts.of, words), int(state), layers])
        edges = [[*ends, texts.of(_label(value))] for ends, value in self._edges.items()]
        return {"nodes": nodes, "edges": edges}

    def view(self, layer: str, drawings: _Drawings) -> list[Any] | None:
        """Return the drawing of the layer's nodes and their neighbours, the nodes, and how many were left
        out."""
        core = [self._number[node] for node in self._side.nodes.get(layer, ())]
        if not core:
            return None
        wanted = self._around(core)
        if len(wanted) <= _FEW:
            wanted = self._around(wanted)
        shown = sorted(wanted[:_MOST])
        place = {number: position for position, number in enumerate(shown)}
        edges = sorted(
            (place[start], place[end])
            for start in shown
            for end in self._near.get(start, ())
            if end in place and (start, end) in self._edges
        )
        return [drawings.of(len(shown), edges), shown, len(wanted) - len(shown)]

    def _around(self, core: Sequence[int]) -> list[int]:
        near = (other for number in core for other in self._near.get(number, ()))
        return list(dict.fromkeys((*core, *near)))


def _signature(node: ir.Node) -> tuple[str, str, str]:
    return node.domain, node.op_type, (node.outputs[0].name or "") if node.outputs else ""


def _detail(node: ir.Node) -> str:
    """Return the node's largest constant as text: ``int8 384×1536``."""
    held = [value.const_value for value in node.inputs if value is not None and value.const_value is not None]
    largest = max(held, key=lambda part: part.nbytes, default=None)
    if largest is None or largest.size < 2:
        return ""
    return f"{largest.dtype.name.lower()} {'×'.join(str(dim) for dim in largest.shape)}"


def _label(value: ir.Value) -> str:
    kind = value.dtype.name.lower() if value.dtype is not None else "?"
    dims = "" if value.shape is None else "×".join(_dim(dim) for dim in value.shape)
    return f"{kind} {dims}".strip()


def _dim(dim: int | ir.SymbolicDim) -> str:
    return str(dim) if isinstance(dim, int) else str(dim.value or "?")


def _drawing(count: int, edges: Sequence[tuple[int, int]]) -> dict[str, Any]:
    drawn = draw_layered(count, edges)
    return {
        "width": drawn.width,
        "rows": drawn.layers,
        "places": [number for place in drawn.places for number in place],
        "edges": [
            [*edge, *(number for point in drawn.bends.get(edge, ()) for number in point)] for edge in edges
        ],
    }
