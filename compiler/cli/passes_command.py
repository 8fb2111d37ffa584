# SPDX-License-Identifier: Apache-2.0
"""``splitfold passes``."""

from __future__ import annotations

import dataclasses
import importlib.resources
import inspect
import re
from typing import Annotated

import typer
from rich.markdown import Markdown

from splitfold.compiler.cli.group import usage
from splitfold.compiler.cli.options import DebugOption
from splitfold.compiler.cli.output import out, table
from splitfold.compiler.presets import PRESETS
from splitfold.passes.base import Pass
from splitfold.passes.errors import SpecError
from splitfold.passes.spec import option_types, type_text, value_text
from splitfold.passes.table import PASSES
from splitfold.runtime.errors import did_you_mean

__all__ = ["passes_command"]

_ARGUMENT = re.compile(r"^(?P<name>\w+): (?P<help>.*)$")


def passes_command(
    name: Annotated[str | None, typer.Argument(help="A pass, for its options and its page.")] = None,
    debug: DebugOption = False,
) -> None:
    """List the passes and presets; with NAME show one pass's options and its page.

    \b
    Example:
      splitfold passes quantize-weights
    """
    if name is None:
        _print_table()
    else:
        with usage("NAME"):
            _print_pass(_find(name))


def _print_table() -> None:
    table(
        ("pass", "contract", "what it does"),
        [(kind.name, kind.contract.value, _summary(kind)) for kind in PASSES],
    )
    table(("preset", "pipeline"), [(name, str(make())) for name, make in PRESETS.items()])


def _summary(kind: type[Pass]) -> str:
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def _find(name: str) -> type[Pass]:
    kinds = {kind.name: kind for kind in PASSES}
    if name not in kinds:
        raise SpecError(f"unknown pass '{name}'.{did_you_mean(name, kinds)} Known: {', '.join(kinds)}.")
    return kinds[name]


def _print_pass(kind: type[Pass]) -> None:
    out().print(f"{kind.name} ({kind.contract.value})\n\n{_prose(kind)}\n", soft_wrap=True)
    helps = _argument_helps(kind)
    fields = {field.name.replace("_", "-"): field for field in dataclasses.fields(kind)}
    rows = [
        (option, type_text(wanted), value_text(_default(fields[option])), helps.get(option, ""))
        for option, wanted in option_types(kind).items()
    ]
    table(("option", "type", "default", "what it does"), rows)
    page = _page(kind.name)
    if page is not None:
        out().print(Markdown(page))


def _default(field: dataclasses.Field[object]) -> object:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _prose(kind: type[Pass]) -> str:
    """Return the class docstring without its Args, which become the table."""
    text = inspect.getdoc(kind) or ""
    return re.sub(r"\nArgs:\n(?:(?: +.*)?\n)+", "\n", text + "\n").strip()


def _argument_helps(kind: type[Pass]) -> dict[str, str]:
    """Return the help of each option from the Args of the class and of its parents."""
    found: dict[str, str] = {"require": "how much must be applied, or the pass fails"}
    for parent in reversed(kind.__mro__):
        section = re.search(r"\nArgs:\n((?:(?: +.*)?\n)+)", f"{inspect.cleandoc(parent.__doc__ or '')}\n")
        if section is not None:
            found |= _parsed(section[1])
    return found


def _parsed(section: str) -> dict[str, str]:
    found: dict[str, str] = {}
    last = ""
    for line in inspect.cleandoc(section).splitlines():
        match = _ARGUMENT.match(line)
        if match is not None:
            last = match["name"].replace("_", "-")
            found[last] = match["help"]
        elif last and line.strip():
            found[last] += " " + line.strip()
    return found


def _page(name: str) -> str | None:
    try:
        file = importlib.resources.files("splitfold.passes.pages").joinpath(f"{name}.md")
    except ModuleNotFoundError:
        return None
    return file.read_text(encoding="utf-8") if file.is_file() else None
