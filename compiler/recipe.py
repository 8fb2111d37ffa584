# SPDX-License-Identifier: Apache-2.0
"""Recipes: a pipeline as a TOML file that can be kept, reviewed and shared."""

from __future__ import annotations

import enum
import json
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path

from splitfold.compiler.presets import preset
from splitfold.passes.base import Pass
from splitfold.passes.errors import SpecError
from splitfold.passes.pipeline import Pipeline
from splitfold.passes.spec import option_types, pass_from_options
from splitfold.passes.table import PASSES
from splitfold.passes.worded import Worded
from splitfold.runtime.errors import did_you_mean

__all__ = ["read_recipe", "recipe_text"]

_KEYS = ("preset", "pass")


def read_recipe(path: str | Path) -> Pipeline:
    """Return the pipeline of a recipe: ``preset = "int8"``, or tables ``[[pass]]`` with `name` and options.

    Raises:
        SpecError: no such file, not TOML, an unknown key, pass, option or preset, or a value of a wrong
            type; it names file and key.
    """
    file = Path(path)
    table = _load(file)
    for key in table:
        if key not in _KEYS:
            raise SpecError(
                f"{file}: unknown key '{key}'.{did_you_mean(key, _KEYS)} A recipe holds {' or '.join(_KEYS)}."
            )
    if len(table) != 1:
        raise SpecError(
            f'{file}: give either preset = "..." or [[pass]] tables; '
            f"it holds {'both' if table else 'neither'}."
        )
    if "preset" in table:
        return _preset(file, table["preset"])
    steps = table["pass"]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise SpecError(f"{file}: 'pass' must be an array of tables: write [[pass]] above each pass.")
    return Pipeline(tuple(_step(file, position, step) for position, step in enumerate(steps)))


def recipe_text(pipeline: Pipeline) -> str:
    """Return the recipe of a pipeline, which `read_recipe` reads back."""
    tables = []
    for step in pipeline:
        plain, lines = type(step)(), ["[[pass]]", f"name = {_toml(step.name)}"]
        for option in option_types(type(step)):
            value = getattr(step, option.replace("-", "_"))
            if value != getattr(plain, option.replace("-", "_")):
                lines.append(f"{option} = {_toml(value)}")
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def _toml(value: object) -> str:
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, Worded):
        value = str(value)
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if value is None:
        return '"none"'
    # a basic string of TOML is escaped as in JSON, but for DEL, which no layer's name holds
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else repr(value)


def _load(file: Path) -> dict[str, object]:
    try:
        with file.open("rb") as opened:
            return tomllib.load(opened)
    except FileNotFoundError as error:
        raise SpecError(f"no such recipe: {file}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read the recipe {file}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{file} is not TOML: {error}") from error


def _preset(file: Path, name: object) -> Pipeline:
    if not isinstance(name, str):
        raise SpecError(f"{file}: key 'preset' is {name!r}, not a text.")
    try:
        return preset(name)
    except SpecError as error:
        raise SpecError(f"{file}: key 'preset': {error}") from error


def _step(file: Path, position: int, options: Mapping[str, object]) -> Pass:
    name = options.get("name")
    where = f"{file}: pass[{position}]"
    if not isinstance(name, str):
        raise SpecError(
            f"{where}: key 'name' is {'missing' if name is None else repr(name) + ', not a text'}."
        )
    rest = {key: value for key, value in options.items() if key != "name"}
    kinds = {kind.name: kind for kind in PASSES}
    known = option_types(kinds[name]) if name in kinds else {}
    for key, value in rest.items():
        if isinstance(value, str) and key in known and _is_number(known[key], value):
            raise SpecError(
                f"{where} ({name}): key '{key}' is the text \"{value}\": write it without quotes."
            )
    try:
        return pass_from_options(name, rest, PASSES)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from error


def _is_number(kind: object, value: str) -> bool:
    """Whether an option of type `kind` takes a number or truth value, and `value` is not its ``none``."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return value != "none" and any(_is_number(part, value) for part in typing.get_args(kind))
    return kind in (int, float, bool)
