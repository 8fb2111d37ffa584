# SPDX-License-Identifier: Apache-2.0
"""Every case of every pass page: text, validity, numbers, the truth of `modified`, and a second run."""

from __future__ import annotations

from pathlib import Path

import pytest
from page import UNCHANGED, Case, accept, check_case, read_page

PAGES = sorted((Path(__file__).parent / "passes").glob("*.md"))
CASES = [(path, case) for path in PAGES for case in read_page(path)]


@pytest.mark.parametrize(("path", "case"), CASES, ids=[f"{case.page}: {case.title}" for _, case in CASES])
def test_case(path: Path, case: Case, request: pytest.FixtureRequest) -> None:
    text = check_case(case)
    if request.config.getoption("--accept"):
        accept(path, case, text)
    else:
        assert text == case.after, (
            "the after side differs: look at it, and run pytest --accept if it is right"
        )


@pytest.mark.parametrize("path", PAGES, ids=[path.stem for path in PAGES])
def test_a_case_stays_unchanged(path: Path) -> None:
    assert any(case.after.split("\n")[0] == UNCHANGED for case in read_page(path))


@pytest.mark.parametrize("path", PAGES, ids=[path.stem for path in PAGES])
def test_titles_are_unique(path: Path) -> None:
    titles = [case.title for case in read_page(path)]
    assert len(set(titles)) == len(titles)
