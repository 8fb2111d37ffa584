# SPDX-License-Identifier: Apache-2.0
"""The rows of a report's layers: what each is held in before and after, what each pass did to it, and how far
its output moved."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from splitfold.compiler.debug.drift.measurement import Drift, Point
from splitfold.compiler.debug.report.data import Event, EventKind, Held, LayerRow
from splitfold.compiler.debug.report.formatting import decibels, finite
from splitfold.compiler.debug.report.side import Side
from splitfold.passes.pipeline import PassRecord

__all__ = ["layer_rows", "named_layers"]


def layer_rows(
    before: Side,
    after: Side,
    records: Sequence[PassRecord],
    manifest: Mapping[str, Any],
    found: Drift | None,
) -> tuple[LayerRow, ...]:
    """Return the layers of both models, in the order of the original, with their history and error."""
    names = [*dict.fromkeys((*before.nodes, *after.nodes))]
    history = _history(names, records, manifest.get("put_back", {}))
    points = _points(set(names), found)
    return tuple(
        _row(name, before, after, manifest.get("realised", {}), history.get(name, ()), points.get(name))
        for name in names
    )


def named_layers(text: str, known: Collection[str]) -> tuple[str, ...]:
    """Return the layers that `text` of a record names: one of `known`, or several joined by ``+``."""
    if text in known:
        return (text,)
    return tuple(part for part in text.split("+") if part in known)


def _row(
    name: str,
    before: Side,
    after: Side,
    realised: Mapping[str, Any],
    history: tuple[Event, ...],
    point: Point | None,
) -> LayerRow:
    was, now = before.held(name), after.held(name)
    kernel = realised.get(name)
    if now is not None and kernel is not None:
        now = Held(now.precision, now.text, now.size, str(kernel["kernel"]))
    operator, shape = _operator(name, before if name in before.nodes else after)
    return LayerRow(
        name,
        operator,
        shape,
        was,
        now,
        bool(kernel["low_bit"]) if kernel is not None else None,
        history,
        None if point is None else decibels(point.accumulated),
        None if point is None or point.local is None else decibels(point.local),
        point is not None and point.accumulated.max_abs == 0,
        _blame(point),
    )


def _operator(name: str, side: Side) -> tuple[str, tuple[int, ...]]:
    if name in side.weighted:
        facts = side.weighted[name][1]
        return facts.kind, facts.shape
    kinds = list(dict.fromkeys(node.op_type for node in side.nodes[name]))
    return ", ".join(kinds[:3]) + (", ..." if len(kinds) > 3 else ""), ()


def _blame(point: Point | None) -> str:
    if point is None or not (point.source or point.note):
        return ""
    where = "An error arises here" if point.source else "Seen here"
    return ": ".join(part for part in (where, point.note) if part) + "."


def _history(
    names: Sequence[str], records: Sequence[PassRecord], put_back: Mapping[str, str]
) -> dict[str, tuple[Event, ...]]:
    events: dict[str, list[Event]] = {}
    known = set(names)
    for record in records:
        step = record.text.partition("{")[0]
        for kind, items in ((EventKind.APPLIED, record.applied), (EventKind.SKIPPED, record.skipped)):
            for layers, what in items:
                for layer in named_layers(layers, known):
                    sqnr = finite(record.measured.get(layer, record.measured.get(layers)))
                    events.setdefault(layer, []).append(Event(step, kind, what, sqnr))
    for layer, kernel in put_back.items():
        words = f"put back to float: no low-bit kernel computed it, it ran as {kernel}"
        events.setdefault(layer, []).append(Event("compile", EventKind.TAKEN_BACK, words))
    return {layer: tuple(items) for layer, items in events.items()}


def _points(names: Collection[str], found: Drift | None) -> dict[str, Point]:
    if found is None:
        return {}
    points: dict[str, Point] = {}
    for text, point in found.by_layer().items():
        for layer in named_layers(text, names):
            points.setdefault(layer, point)
    return points
