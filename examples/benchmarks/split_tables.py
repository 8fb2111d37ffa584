# SPDX-License-Identifier: Apache-2.0
"""Tables that are printed as they fill and written as Markdown at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.table import Table as RichTable

from splitfold.examples.benchmarks.report import console, machine

__all__ = ["Table", "spread", "write_tables"]


@dataclass
class Table:
    """Rows under a heading; `verdicts` say what was expected and whether it came."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    verdicts: list[tuple[str, bool]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """Add a row."""
        self.rows.append(cells)

    def expect(self, what: str, came: bool) -> None:
        """Add an expectation."""
        self.verdicts.append((what, came))

    def show(self) -> None:
        """Print it."""
        table = RichTable(title=self.title, title_justify="left")
        for column in self.columns:
            table.add_column(column, overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        for what, came in self.verdicts:
            console.print(f"{'pass  ' if came else 'MISSED'}  {what}", soft_wrap=True, highlight=False)

    def markdown(self) -> str:
        """Return it as Markdown."""
        lines = [f"## {self.title}", "", _row(self.columns), _row(["---"] * len(self.columns))]
        lines += [_row(row) for row in self.rows]
        verdicts = [
            f"- {'as expected' if came else 'NOT as expected'}: {what}" for what, came in self.verdicts
        ]
        return "\n".join([*lines, "", *verdicts, ""])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Return the mean, and the least and the largest where there are several."""
    mean = format(float(np.mean(values)), form)
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def write_tables(tables: Sequence[Table], path: Path) -> None:
    """Write all tables, and the machine."""
    path.write_text("\n".join([*(table.markdown() for table in tables), machine(), ""]), encoding="utf-8")
