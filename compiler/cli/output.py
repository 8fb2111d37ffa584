# SPDX-License-Identifier: Apache-2.0
"""Consoles, and small pieces of text that several commands print."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

import onnx_ir as ir
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from splitfold.runtime.compare import Deviation

__all__ = ["deviation_text", "errors", "file_bytes", "megabytes", "out", "say", "table"]

_FILE_WIDTH = 200
"""Columns where the output is no terminal: nothing is cut off in a log."""


def _console(stream: TextIO, *, stderr: bool) -> Console:
    width = None if stream.isatty() else _FILE_WIDTH
    return Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


def out() -> Console:
    """Return the console of standard output."""
    return _console(sys.stdout, stderr=False)


@functools.cache
def errors() -> Console:
    """Return the console of standard error: one, so that log lines and progress bars do not overwrite each
    other."""
    return _console(sys.stderr, stderr=True)


def say(name: str, text: object) -> None:
    """Print one named line."""
    out().print(f"{name:<12}{text}", soft_wrap=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "") -> None:
    """Print a table; columns whose name ends with ``#`` are aligned right (the sign is not printed)."""
    made = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for column in columns:
        right = column.endswith("#")
        made.add_column(
            column.rstrip("#"), justify="right" if right else "left", overflow="fold", no_wrap=right
        )
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    out().print(made)


def megabytes(size: float) -> str:
    """Return `size` bytes in MB (10^6 bytes), or in kB where it is small."""
    return f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def file_bytes(file: Path) -> int:
    """Return the bytes of a file, with an ``.onnx`` those of its weights in other files; 0 where there is
    none."""
    if not file.is_file():
        return 0
    if file.suffix != ".onnx":
        return file.stat().st_size
    tensors = [v.const_value for graph in ir.load(file).graphs() for v in graph.initializers.values()]
    apart = {(t.path, t.offset): t.nbytes for t in tensors if isinstance(t, ir.ExternalTensor)}
    return file.stat().st_size + sum(apart.values())


def deviation_text(found: Deviation | None) -> str:
    """Return a deviation for a table cell."""
    if found is None:
        return "-"
    return "equal" if found.max_abs == 0 else str(found)
