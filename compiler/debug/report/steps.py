# SPDX-License-Identifier: Apache-2.0
"""The rows of a report's passes, from fresh records or from those in a manifest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from splitfold.compiler.debug.report.data import Group, OutputRow, PassRow
from splitfold.compiler.debug.report.formatting import decibels, finite
from splitfold.passes.pipeline import PassRecord
from splitfold.runtime.compare import Deviation

__all__ = ["deviation_from", "output_row", "pass_rows", "records_from"]


def pass_rows(records: Sequence[PassRecord]) -> tuple[PassRow, ...]:
    """Return one row a pass."""
    timed = any(record.seconds for record in records)
    return tuple(_row(record, timed) for record in records)


def _row(record: PassRecord, timed: bool) -> PassRow:
    return PassRow(
        name=record.text.partition("{")[0],
        text=record.text,
        contract=record.contract,
        modified=record.modified,
        seconds=record.seconds if timed else None,
        nodes_before=record.nodes_before,
        nodes_after=record.nodes_after,
        bytes_before=record.bytes_before,
        bytes_after=record.bytes_after,
        applied=_grouped(record.applied),
        skipped=_grouped(record.skipped),
        notes=record.notes,
        deviation=None if record.deviation is None else output_row("", record.deviation),
    )


def _grouped(items: Iterable[tuple[str, str]]) -> tuple[Group, ...]:
    groups: dict[str, list[str]] = {}
    for layer, what in items:
        groups.setdefault(what, []).append(layer)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return tuple(Group(what, tuple(layers)) for what, layers in ordered)


def output_row(name: str, found: Deviation) -> OutputRow:
    """Return a deviation as a row."""
    return OutputRow(
        name,
        round(found.cosine, 6),
        decibels(found),
        finite(found.max_abs),
        finite(found.relative),
        found.top1,
        found.max_abs == 0,
    )


def deviation_from(values: Mapping[str, Any]) -> Deviation:
    """Return a deviation from its form in a manifest, where infinities are texts."""
    number = {key: None if value is None else float(value) for key, value in values.items()}

    def of(key: str) -> float:
        value = number.get(key)
        return math.nan if value is None else value

    return Deviation(of("max_abs"), of("relative"), of("cosine"), of("sqnr_db"), number.get("top1"))


def records_from(manifest: Mapping[str, Any]) -> tuple[PassRecord, ...]:
    """Return the records of a manifest; times are not kept in one and are zero."""
    return tuple(_record(values) for values in manifest.get("records", ()))


def _record(values: Mapping[str, Any]) -> PassRecord:
    deviation = values.get("deviation")
    return PassRecord(
        text=str(values["text"]),
        contract=str(values["contract"]),
        modified=bool(values["modified"]),
        nodes_before=int(values["nodes_before"]),
        nodes_after=int(values["nodes_after"]),
        bytes_before=int(values["bytes_before"]),
        bytes_after=int(values["bytes_after"]),
        applied=tuple((str(layer), str(what)) for layer, what in values["applied"]),
        skipped=tuple((str(layer), str(what)) for layer, what in values["skipped"]),
        notes=tuple(str(note) for note in values["notes"]),
        carried=dict(values.get("carried", {})),
        deviation=None if deviation is None else deviation_from(deviation),
        measured={str(layer): float(found) for layer, found in values.get("measured", {}).items()},
    )
