# SPDX-License-Identifier: Apache-2.0
"""The command group: every error of a command becomes one readable block and exit code 1."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.text import Text
from typer.core import TyperGroup

from splitfold.compiler.cli.output import errors
from splitfold.passes.errors import SpecError
from splitfold.runtime.errors import SplitfoldError, UnsupportedError

__all__ = ["DEBUG", "Commands", "usage"]

DEBUG = "splitfold.debug"
"""Key of the root context's `meta` under which ``--debug`` is kept."""


class Commands(TyperGroup):
    """A group whose failing commands end with a block on standard error (``--debug``: a traceback)."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the command line names."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            usage_error = hasattr(error, "exit_code")  # typer brings its own copy of click's classes
            if usage_error or ctx.find_root().meta.get(DEBUG):
                raise
            _show(error)
            raise typer.Exit(1) from error


def _show(error: Exception) -> None:
    expected = isinstance(error, SplitfoldError | ValueError | OSError)
    title = _words(type(error).__name__) if isinstance(error, SplitfoldError) else "error"
    text = Text()
    text.append(f"{title if expected else f'unexpected {type(error).__name__}'}: ", style="bold red")
    text.append(str(error).strip() or "no message")
    if not expected:
        text.append(
            "\nThis is a bug of splitfold, or of a library it uses. Run again with --debug for the traceback."
        )
    errors().print(text, soft_wrap=True)


def _words(name: str) -> str:
    """Return a class name as words: ``PassFailedError`` is ``pass failed``, ``SpecError`` ``spec error``."""
    words = re.findall("[A-Z][a-z]*", name)
    kept = words[:-1] if len(words) > 2 else words
    return " ".join(kept).lower()


@contextmanager
def usage(option: str) -> Iterator[None]:
    """Turn an error in the value of `option` into a usage error, which exits with 2."""
    try:
        yield
    except (SpecError, UnsupportedError) as error:
        raise typer.BadParameter(str(error), param_hint=option) from error
