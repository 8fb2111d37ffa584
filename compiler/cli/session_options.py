# SPDX-License-Identifier: Apache-2.0
"""Options on how sessions of a result are opened, and what a bare session needs, as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from splitfold.compiler.cli.group import usage
from splitfold.compiler.cli.output import say
from splitfold.passes.errors import SpecError
from splitfold.passes.spec import split_top_level
from splitfold.runtime.artifact import MANIFEST_FILE, read_manifest
from splitfold.runtime.errors import did_you_mean
from splitfold.runtime.offline import OFFLINE_KEY
from splitfold.runtime.options import SessionOptions

__all__ = [
    "OfflineOption",
    "SessionOption",
    "parse_session",
    "say_offline",
    "say_session",
    "say_stored",
    "stored_options",
]

_WORDS = ("threads", "spinning", "arena", "disable")
_TRUTH = {"true": True, "false": False}

SessionOption = Annotated[
    str | None,
    typer.Option(
        "--session",
        metavar="OPTIONS",
        help="How sessions of the result are opened and measured, for the manifest: "
        "'threads=2,spinning=false,arena=false,disable=[SkipLayerNormFusion],session.KEY=VALUE' (default: "
        "as the runtime does).",
    ),
]
OfflineOption = Annotated[
    bool,
    typer.Option(
        "--offline-optimized",
        help="Write the graph as the runtime's own optimisation leaves it: sessions open faster, but it "
        "suits this processor and runtime only.",
    ),
]


def parse_session(text: str | None) -> SessionOptions:
    """Return the options of ``--session``.

    Raises:
        typer.BadParameter: an unknown option, or a value of the wrong kind.
    """
    with usage("--session"):
        return SessionOptions() if text is None else _parsed(text)


def _parsed(text: str) -> SessionOptions:
    found: dict[str, str] = {}
    for part in split_top_level(text):
        name, equals, value = part.partition("=")
        if name in _WORDS and not equals:
            raise SpecError(f"{name}: give a value, as in {name}=....")
        if not equals or (name not in _WORDS and "." not in name):
            raise SpecError(
                f"unknown option '{part}'.{did_you_mean(name, _WORDS)} Known: {', '.join(_WORDS)}, and "
                "configuration entries such as session.KEY=VALUE."
            )
        found[name] = value
    entries = tuple((name, value) for name, value in found.items() if name not in _WORDS)
    names = [name.strip() for name in found.get("disable", "").strip("[]").split(",")]
    return SessionOptions(
        _number(found.get("threads", "0")),
        _truth("spinning", found.get("spinning", "true")),
        _truth("arena", found.get("arena", "true")),
        tuple(filter(None, names)),
        entries,
    )


def _number(value: str) -> int:
    if not value.isdecimal():
        raise SpecError(f"threads={value}: give a whole number; 0 is the runtime's choice.")
    return int(value)


def _truth(name: str, value: str) -> bool:
    if value not in _TRUTH:
        raise SpecError(f"{name}={value}: give true or false.")
    return _TRUTH[value]


def say_session(options: SessionOptions) -> None:
    """Print what a bare session needs, where it needs anything."""
    for line in options.code().splitlines() if options else ():
        say("session", line)


def stored_options(place: Path) -> SessionOptions:
    """Return the session options that an artifact's manifest names; none for a file without a manifest.

    Raises:
        ArtifactError: the manifest holds something else.
    """
    if not (place / MANIFEST_FILE).is_file():
        return SessionOptions()
    return SessionOptions.of(read_manifest(place).get("session", {}))


def say_stored(place: Path, options: SessionOptions) -> None:
    """Print what a model is opened with, where it is opened with anything."""
    if options:
        say("session", f"{place} with {json.dumps(options.values())}")


def say_offline(manifest: Mapping[str, Any]) -> None:
    """Print for what a graph was optimised offline, where it was."""
    facts = manifest.get(OFFLINE_KEY)
    if facts is not None:
        say("optimised", f"offline, for {facts['processor']} and onnxruntime {facts['runtime']} only")
