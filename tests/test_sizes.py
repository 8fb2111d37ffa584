# SPDX-License-Identifier: Apache-2.0
"""Files and functions stay small: what grows beyond these is split."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("compiler", "passes", "runtime", "examples", "tests")
FILE, FUNCTION = 400, 60


def sources() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_there_is_something_to_measure(folder: str) -> None:
    assert any(folder in path.relative_to(ROOT).parts for path in sources())


def test_files() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert not {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > FILE}


def test_functions() -> None:
    long = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION:
                    long[f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"] = lines
    assert not long
