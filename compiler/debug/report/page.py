# SPDX-License-Identifier: Apache-2.0
"""What the page's template and scripts need beyond the report's data: lookups, shares, and JSON for the
viewer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from splitfold.compiler.debug.report.data import (
    Distribution,
    DriftPoint,
    Event,
    LayerRow,
    OutputRow,
    ReportData,
)
from splitfold.compiler.debug.report.figures import figures
from splitfold.compiler.debug.report.formatting import byte_text, decibel_text
from splitfold.compiler.debug.report.layers import named_layers

__all__ = ["Page"]

_SUSPECTS = 10


@dataclass(frozen=True)
class Page:
    """The view of `report` that the template draws."""

    report: ReportData

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Place of each layer."""
        return {row.name: number for number, row in enumerate(self.report.layers)}

    def named(self, text: str) -> tuple[str, ...]:
        """Return the layers that a text of a record names."""
        return named_layers(text, self.index)

    @property
    def sections(self) -> Sequence[tuple[str, str]]:
        """(anchor, title) of the sections that there are."""
        every = (
            ("size", "Size", True),
            ("passes", "Passes", True),
            ("drift", "Drift", bool(self.report.drift)),
            ("grids", "Grids", bool(self.report.distributions)),
            ("outliers", "Outliers", bool(self.report.outliers or self.report.attention)),
            ("layers", "Layers", True),
            ("operators", "Operators", True),
            ("environment", "Environment", True),
        )
        return [(anchor, title) for anchor, title, there in every if there]

    @property
    def seconds(self) -> float | None:
        """Time of all passes, or None where it is not known."""
        known = [row.seconds for row in self.report.passes if row.seconds is not None]
        return sum(known) if known else None

    @property
    def size_share(self) -> float:
        """Bytes after in percent of those before, 100 at most."""
        before, after = self.report.size
        return round(min(100.0, 100 * after / before), 2) if before else 100.0

    def share(self, value: float | None) -> str:
        """Return a share in percent, or a dash."""
        return "–" if value is None else f"{100 * value:.1f} %"

    def width(self, size: int) -> float:
        """Return bytes in percent of the larger model."""
        return round(100 * size / max(*self.report.size, 1), 3)

    def bar(self, count: int | None) -> float:
        """Return an operator count in percent of the largest."""
        largest = max((max(row.before or 0, row.after or 0) for row in self.report.operators), default=1)
        return round(100 * (count or 0) / max(largest, 1), 1)

    @property
    def opened(self) -> bool:
        """Whether the operators are those of the runtime's own graphs."""
        return any(row.provider for row in self.report.operators)

    @property
    def low_bit(self) -> int:
        """Layers whose weight is held in low precision."""
        held = [row.after for row in self.report.layers if row.shape and row.after is not None]
        return sum(item.precision.is_low_bit for item in held)

    @property
    def weighted(self) -> int:
        """Layers with a weight."""
        return sum(bool(row.shape) for row in self.report.layers)

    @property
    def unpadded(self) -> OutputRow | None:
        """The worst output over the positions that are no padding, or None where nothing was left out."""
        facts = self.report.drift_facts
        return facts.outputs[0] if facts is not None and facts.padding and facts.outputs else None

    @property
    def equal(self) -> int:
        """Values that are equal in both models, or infinitely apart."""
        return sum(point.exact for point in self.report.drift)

    @property
    def suspects(self) -> Sequence[DriftPoint]:
        """The values where an error arises, by blame."""
        sources = [point for point in self.report.drift if point.source]
        return sorted(sources, key=lambda point: point.rank)[:_SUSPECTS]

    @property
    def by_layer(self) -> Sequence[tuple[int, list[tuple[int, Distribution]]]]:
        """Numbered distributions, layer by layer."""
        found: dict[int, list[tuple[int, Distribution]]] = {}
        for number, item in enumerate(self.report.distributions):
            found.setdefault(item.layer, []).append((number, item))
        return list(found.items())

    @property
    def data(self) -> dict[str, Any]:
        """JSON for the scripts."""
        return {
            "layers": [_layer(row) for row in self.report.layers],
            "graph": self.report.graph,
            "figures": figures(self.report),
        }


def _layer(row: LayerRow) -> dict[str, Any]:
    return {
        "name": row.name,
        "facts": [[name, value] for name, value in _facts(row) if value],
        "blame": row.blame,
        "story": [_event(event) for event in row.history],
    }


def _event(event: Event) -> list[str]:
    told = event.sqnr_db is None or "dB" in event.what
    measured = "" if told else f" (measured: {decibel_text(event.sqnr_db)} dB)"
    return [event.step, str(event.kind), event.what + measured]


def _facts(row: LayerRow) -> Sequence[tuple[str, str]]:
    was, now = row.before, row.after
    return (
        ("operator", row.operator),
        ("weight", " × ".join(str(dim) for dim in row.shape)),
        ("precision", _changed(was.text if was else "", now.text if now else "gone")),
        ("bytes", _changed(byte_text(was.size) if was else "", byte_text(now.size) if now else "0 B")),
        ("kernel", _changed(was.kernel if was else "", now.kernel if now else "")),
        ("low-bit kernel", "" if row.low_bit is None else "yes" if row.low_bit else "no"),
        ("local SQNR", "" if row.local_db is None else f"{decibel_text(row.local_db)} dB"),
        (
            "accumulated SQNR",
            "equal"
            if row.exact
            else ""
            if row.accumulated_db is None
            else f"{decibel_text(row.accumulated_db)} dB",
        ),
    )


def _changed(before: str, after: str) -> str:
    return after if before == after or not before else before if not after else f"{before} → {after}"
