# SPDX-License-Identifier: Apache-2.0
"""The text form of passes and pipelines, which round-trips: ``canonicalize,quantize-
weights{bits=4,block=32}``."""

from __future__ import annotations

import dataclasses
import enum
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence

from splitfold.passes.base import Pass
from splitfold.passes.errors import SpecError
from splitfold.passes.worded import Worded
from splitfold.runtime.errors import did_you_mean

__all__ = [
    "option_types",
    "parse_pass",
    "pass_from_options",
    "pass_text",
    "split_top_level",
    "type_text",
    "value_text",
]

_PASS = re.compile(r"^(?P<name>[a-z][a-z0-9-]*)\s*(?:\{(?P<options>.*)\})?$", re.DOTALL)
_PLAIN = re.compile(r"^[^\s,{}\[\]=\"]+$")


def option_types(kind: type[Pass]) -> dict[str, object]:
    """Return the options of a pass in text form (dashes) with their Python types."""
    hints = typing.get_type_hints(kind)
    return {field.name.replace("_", "-"): hints[field.name] for field in dataclasses.fields(kind)}


def pass_text(value: Pass) -> str:
    """Return the text form of a pass: its name, and the options that differ from their defaults."""
    options = [
        f"{field.name.replace('_', '-')}={value_text(getattr(value, field.name))}"
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != _default(field)
    ]
    return f"{value.name}{{{','.join(options)}}}" if options else value.name


def _default(field: dataclasses.Field[object]) -> object:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def value_text(value: object) -> str:
    """Return the text form of an option's value."""
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{','.join(value_text(item) for item in value)}]"
    if value is None:
        return "none"
    if isinstance(value, str) and not _PLAIN.match(value):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value) if isinstance(value, float) else str(value)


def parse_pass(text: str, table: Sequence[type[Pass]]) -> Pass:
    """Parse the text form of one pass.

    Raises:
        SpecError: unknown pass or option, or a value of the wrong type.
    """
    match = _PASS.match(text.strip())
    if match is None:
        raise SpecError(f"cannot read '{text.strip()}' as a pass: expected name{{option=value,...}}.")
    options: dict[str, object] = {}
    for item in split_top_level(match["options"] or ""):
        name, equals, value = item.partition("=")
        if not equals:
            raise SpecError(f"cannot read '{item}' in '{text.strip()}': expected option=value.")
        if name.strip() in options:
            raise SpecError(
                f"'{text.strip()}' gives the option {name.strip()} twice; a list is written [a,b]."
            )
        options[name.strip()] = value.strip()
    return pass_from_options(match["name"], options, table)


def pass_from_options(name: str, options: Mapping[str, object], table: Sequence[type[Pass]]) -> Pass:
    """Return the pass of this name with options given as text or as Python values (of a recipe).

    Raises:
        SpecError: unknown pass or option, a value of the wrong type, or one that the pass refuses.
    """
    kinds = {kind.name: kind for kind in table}
    if name not in kinds:
        raise SpecError(
            f"unknown pass '{name}'.{did_you_mean(name, kinds)} Known: {', '.join(sorted(kinds))}."
        )
    known = option_types(kinds[name])
    for option in options:
        if option not in known:
            raise SpecError(
                f"{name} has no option '{option}'.{did_you_mean(option, known)} Options: {', '.join(known)}."
            )
    values: dict[str, typing.Any] = {
        option.replace("-", "_"): _typed(name, option, value, known[option])
        for option, value in options.items()
    }
    try:
        return kinds[name](**values)
    except ValueError as error:
        raise SpecError(f"{name}: {error}") from error


def split_top_level(text: str) -> Iterator[str]:
    """Split at commas outside of braces, brackets and quotes; empty parts are dropped."""
    depth, quoted, escaped, start = 0, False, False, 0
    for position, character in enumerate(text):
        if escaped or (quoted and character == "\\"):
            escaped = not escaped  # a backslash takes the character after it with it
        elif character == '"':
            quoted = not quoted
        elif not quoted and character in "{[":
            depth += 1
        elif not quoted and character in "}]":
            depth -= 1
        elif not quoted and depth == 0 and character == ",":
            yield from filter(None, [text[start:position].strip()])
            start = position + 1
    if depth or quoted:
        raise SpecError(f"unbalanced braces, brackets or quotes in '{text}'.")
    yield from filter(None, [text[start:].strip()])


def _typed(name: str, option: str, value: object, kind: object) -> object:
    try:
        return _convert(value, kind)
    except (ValueError, TypeError) as error:
        raise SpecError(
            f"{name}: option {option}={value} is not "
            f"{type_text(kind)}.{error if str(error)[:1] == ' ' else ''}"
        ) from error


def _convert(value: object, kind: object) -> object:
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        inner = [part for part in typing.get_args(kind) if part is not type(None)]
        return None if value in (None, "none") else _convert(value, inner[0])
    if origin is tuple:
        items = list(split_top_level(_bracketed(value))) if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise ValueError("not a list")
        return tuple(_convert(item, typing.get_args(kind)[0]) for item in items)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _enum(value, kind)
    if isinstance(kind, type) and issubclass(kind, Worded):
        return value if isinstance(value, kind) else kind.parse(str(_scalar(value, str)))
    return _scalar(value, kind)


def _bracketed(text: str) -> str:
    return text[1:-1] if text.startswith("[") and text.endswith("]") else text


def _enum(value: object, kind: type[enum.Enum]) -> enum.Enum:
    words = [str(member.value) for member in kind]
    if not isinstance(value, str) or value not in words:
        raise ValueError(did_you_mean(str(value), words) or "")
    return kind(value)


def _scalar(value: object, kind: object) -> object:
    if kind is bool:
        if isinstance(value, bool):
            return value
        return (
            {"true": True, "false": False}.get(str(value)) if str(value) in ("true", "false") else _refuse()
        )
    if kind is str:
        if not isinstance(value, str):
            _refuse()
        text = str(value)
        return re.sub(r"\\(.)", r"\1", text[1:-1]) if text.startswith('"') else text
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        _refuse()
    if kind is int:
        return int(value) if not isinstance(value, float) else _refuse()
    return float(value)


def _refuse() -> typing.NoReturn:
    raise ValueError("wrong type")


def type_text(kind: object) -> str:
    """Return what an option of this type takes, for people."""
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(
            "none" if part is type(None) else type_text(part) for part in typing.get_args(kind)
        )
    if origin is tuple:
        return f"a list of {type_text(typing.get_args(kind)[0])}"
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in kind)
    if isinstance(kind, type) and issubclass(kind, Worded):
        return kind.described
    return {int: "an integer", float: "a number", bool: "true or false", str: "a text"}.get(kind, str(kind))  # type: ignore[call-overload, no-any-return]
