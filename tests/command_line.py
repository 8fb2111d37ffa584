# SPDX-License-Identifier: Apache-2.0
"""Running the command line in a test: the type of the `run` fixture, and what a failed command looks like."""

from __future__ import annotations

from collections.abc import Callable

from typer.testing import Result

Run = Callable[..., Result]


def assert_failed(result: Result, *parts: str) -> None:
    """Assert that the command ended with one readable block on standard error."""
    assert "Traceback" not in result.output
    for part in parts:
        assert part in result.stderr
