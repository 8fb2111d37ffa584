# SPDX-License-Identifier: Apache-2.0
"""The pictures of a report as plotly figures: plain JSON whose colours are names of CSS variables.

`page.js` puts in the colours of the theme when it draws. Texts are escaped here: plotly reads tags in them.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from splitfold.compiler.debug.report.data import (
    Distribution,
    DriftPoint,
    Held,
    LayerRow,
    Precision,
    ReportData,
)
from splitfold.compiler.debug.report.formatting import byte_text, decibel_text

__all__ = ["COLOURS", "Figure", "figures"]

Figure = dict[str, Any]

COLOURS = {
    Precision.FLOAT: "--float",
    Precision.HALF: "--half",
    Precision.STATIC: "--static",
    Precision.DYNAMIC: "--dynamic",
    Precision.WEIGHTS: "--weights",
    Precision.FOUR: "--four",
    Precision.FEWER: "--fewer",
    Precision.OTHER: "--other",
}
"""CSS variables of the precisions."""

_CEILING = 80.0
"""Decibels beyond which values are as good as equal: they are drawn at the edge."""
_SMALLEST = 0.0004
"""Share of all bytes below which a layer has no tile of its own."""
_PART = re.compile(r"[./]+")


def figures(data: ReportData) -> dict[str, Figure]:
    """Return the figures by the id of the element that shows each."""
    found = {
        "map-after": _map(data.layers, after=True),
        "map-before": _map(data.layers, after=False),
    }
    if any(point.accumulated_db is not None for point in data.drift):
        found["drift-plot"] = _drift(data)
    for number, item in enumerate(data.distributions):
        found[f"distribution-{number}"] = _distribution(item)
    return found


def _text(words: str) -> str:
    return html.escape(words, quote=False)


@dataclass
class _Tiles:
    """Tiles of a treemap by path."""

    names: list[str] = field(default_factory=list)
    parents: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    colours: list[str] = field(default_factory=list)
    inks: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    layers: list[tuple[int, str]] = field(default_factory=list)

    def add(self, name: str, parent: str, label: str, size: int, colour: str, layer: int, hover: str) -> None:
        self.names.append(name)
        self.parents.append(parent)
        self.labels.append(_text(label))
        self.sizes.append(size)
        self.colours.append(colour)
        self.inks.append({"--sheet": "--text", "--static": "--ink-static"}.get(colour, "--ink"))
        self.texts.append(byte_text(size))
        self.layers.append((layer, hover))


def _map(layers: Sequence[LayerRow], *, after: bool) -> Figure:
    """Return a treemap of bytes: module within module, coloured by precision."""
    held = [(number, row, row.after if after else row.before) for number, row in enumerate(layers)]
    sized = [(number, row, item) for number, row, item in held if item is not None and item.size]
    total = sum(item.size for _, _, item in sized)
    tree: dict[str | None, Any] = {}
    rest = 0
    for number, row, item in sized:
        if item.size < _SMALLEST * total:
            rest += item.size
            continue
        at = tree
        for part in [part for part in _PART.split(row.name) if part] or [row.name]:
            at = at.setdefault(part, {})
        if None in at:  # two names that differ in their separators alone
            at = at.setdefault(row.name, {})
        at[None] = (number, row, item)
    tiles = _Tiles()
    tiles.add("/", "", "model", total, "--sheet", -1, f"whole model<br>{byte_text(total)}")
    _grow(tiles, tree, "/", "")
    if rest:
        words = f"layers below {100 * _SMALLEST:.2g} % each<br>{byte_text(rest)}"
        tiles.add("/…", "/", "small layers", rest, "--other", -1, words)
    layout = {"margin": {"t": 0, "l": 0, "r": 0, "b": 0}, "uniformtext": {"minsize": 9, "mode": "hide"}}
    return {"data": [_treemap(tiles)], "layout": layout}


def _grow(tiles: _Tiles, tree: dict[Any, Any], parent: str, prefix: str) -> int:
    """Add the tiles of `tree` under `parent`, and return their bytes."""
    total = 0
    for part, inner in tree.items():
        if part is None:
            continue
        label = f"{prefix}.{part}" if part.isdigit() and prefix else part
        while len(inner) == 1 and None not in inner:  # a module that only holds another one
            (only,) = inner
            label, inner = f"{label}.{only}", inner[only]
            part = f"{part}.{only}"
        name = f"{parent}{part}/"
        own = inner.get(None)
        if len(inner) == 1 and own is not None:
            total += _leaf(tiles, name, parent, label, own)
            continue
        at = len(tiles.names)
        tiles.add(name, parent, label, 0, "--sheet", -1, "")
        size = _grow(tiles, inner, name, label.rpartition(".")[2])
        if own is not None:
            size += _leaf(tiles, f"{name}own", name, label, own)
        tiles.sizes[at], tiles.texts[at] = size, byte_text(size)
        tiles.layers[at] = (-1, f"{tiles.labels[at]}<br>{byte_text(size)}")
        total += size
    return total


def _leaf(tiles: _Tiles, name: str, parent: str, label: str, own: tuple[int, LayerRow, Held]) -> int:
    number, row, item = own
    hover = f"<b>{_text(row.name)}</b><br>{byte_text(item.size)}, {_text(item.text)}"
    if item.kernel:
        hover += f"<br>runs as {_text(item.kernel)}"
    tiles.add(name, parent, label, item.size, COLOURS[item.precision], number, hover)
    return item.size


def _treemap(tiles: _Tiles) -> Figure:
    return {
        "type": "treemap",
        "ids": tiles.names,
        "parents": tiles.parents,
        "labels": tiles.labels,
        "values": tiles.sizes,
        "text": tiles.texts,
        "customdata": [list(item) for item in tiles.layers],
        "marker": {
            "colors": tiles.colours,
            "line": {"width": 1, "color": "--sheet"},
            "pad": {"t": 17, "l": 2, "r": 2, "b": 2},
        },
        "branchvalues": "total",
        "texttemplate": "%{label}<br>%{text}",
        "hovertemplate": "%{customdata[1]}<extra></extra>",
        "tiling": {"packing": "binary", "pad": 1},
        "textfont": {"color": tiles.inks},
        "pathbar": {"visible": False},
        "root": {"color": "--sheet"},
        "sort": False,
    }


def _drift(data: ReportData) -> Figure:
    lowest: dict[int, float] = {}
    for point in data.drift:
        if point.accumulated_db is not None:
            lowest[point.depth] = min(point.accumulated_db, lowest.get(point.depth, _CEILING))
    moved = [point for point in data.drift if point.accumulated_db is not None]
    sources = [point for point in data.drift if point.source and point.local_db is not None]
    line = {
        "type": "scatter",
        "mode": "lines",
        "name": "accumulated, the worst at each depth",
        "line": {"color": "--line-1", "width": 2},
        "x": sorted(lowest),
        "y": [lowest[depth] for depth in sorted(lowest)],
        "hoverinfo": "skip",
    }
    every = _scatter(data, moved, [point.accumulated_db for point in moved])
    every |= {"name": "accumulated", "marker": {"color": "--line-1", "size": 5, "opacity": 0.75}}
    local = _scatter(data, sources, [point.local_db for point in sources])
    local |= {
        "name": "local, where an error arises",
        "marker": {"color": "--line-2", "size": 8, "symbol": "diamond"},
    }
    layout = {
        "xaxis": {
            "title": {"text": "depth"},
            "zeroline": False,
            "rangemode": "tozero",
        },
        "yaxis": {"title": {"text": "SQNR in dB"}, "zeroline": True, "rangemode": "tozero"},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "margin": {"t": 34, "l": 56, "r": 12, "b": 48},
        "hovermode": "closest",
    }
    return {"data": [line, every, local], "layout": layout}


def _scatter(data: ReportData, points: Sequence[DriftPoint], values: Sequence[float | None]) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [point.depth for point in points],
        "y": [min(value or 0.0, _CEILING) for value in values],
        "customdata": [_hover(data, point) for point in points],
        "hovertemplate": "<b>%{customdata[1]}</b><br>%{customdata[2]}<br>accumulated %{customdata[3]}"
        "<br>local %{customdata[4]}<extra></extra>",
    }


def _hover(data: ReportData, point: DriftPoint) -> list[Any]:
    name = "" if point.layer < 0 else data.layers[point.layer].name
    accumulated = "equal" if point.exact else f"{decibel_text(point.accumulated_db)} dB"
    local = "equal or not measured" if point.local_db is None else f"{decibel_text(point.local_db)} dB"
    return [point.layer, _text(name), _text(point.operator), accumulated, local]


def _distribution(item: Distribution) -> Figure:
    """Return a histogram as filled steps (bars below a pixel vanish); the log axis ends at one half."""
    count = len(item.counts)
    step = (item.high - item.low) / count if item.high > item.low else 1.0
    centers = [item.low + (at + 0.5) * step for at in range(count)]
    stored = _steps(centers, item.counts, "--line-1", width=0)
    traces = [{**stored, "fill": "tozeroy", "fillcolor": "--line-1"}]
    if item.original is not None:
        before = _steps(centers, item.original, "--line-2", width=1.5)
        traces.append({**before, "y": [count or None for count in item.original]})
    most = max(max(item.counts), max(item.original or (1,)), 1)
    layout = {
        "yaxis": {
            "type": "log",
            "range": [math.log10(0.5), math.log10(most) + 0.2],
            "title": {"text": "elements"},
            "dtick": 1,
            "exponentformat": "power",
            "tickfont": {"size": 10},
        },
        "xaxis": {"zeroline": False, "range": _window(item)},
        "shapes": _grid_shapes(item),
        "showlegend": False,
        "hovermode": "x",
        "margin": {"t": 8, "l": 52, "r": 8, "b": 32},
    }
    return {"data": traces, "layout": layout}


def _steps(centers: Sequence[float], counts: Sequence[int], colour: str, *, width: float) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": list(centers),
        "y": [count or 0.5 for count in counts],
        "text": [f"{count:,}" for count in counts],
        "line": {"color": colour, "width": width, "shape": "hvh"},
        "hovertemplate": "%{text} elements at %{x:.4g}<extra></extra>",
    }


def _window(item: Distribution) -> list[float]:
    """Return what the axis shows: all values, and the ends of the (median) grid."""
    main = item.ranges[len(item.ranges) // 2] if item.ranges else (item.low, item.high)
    low, high = min(item.low, main[0]), max(item.high, main[1])
    margin = 0.03 * (high - low) or 1.0
    return [low - margin, high + margin]


def _grid_shapes(item: Distribution) -> list[Figure]:
    """Return lines at the ends of what the grid can represent, and at its zero; of many grids the median,
    thinner the narrowest and the widest."""
    shapes = []
    for number, ends in enumerate(item.ranges):
        main = number == len(item.ranges) // 2
        style = {"color": "--mark", "width": 1.6 if main else 1, "dash": "dash" if main else "dot"}
        shapes += [_upright(end, style) for end in ends]
    if item.ranges:
        shapes.append(_upright(0.0, {"color": "--soft", "width": 1}))
    return shapes


def _upright(at: float, style: Figure) -> Figure:
    return {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": at, "x1": at, "line": style}
