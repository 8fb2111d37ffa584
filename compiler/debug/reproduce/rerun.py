# SPDX-License-Identifier: Apache-2.0
"""Running a reproducer: does it still fail, and in the same way?"""

from __future__ import annotations

import enum
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitfold.compiler.debug.reproduce.case import Signature
from splitfold.compiler.debug.reproduce.case_folder import read_case, read_facts
from splitfold.compiler.driver import compile
from splitfold.compiler.manifest import installed_version
from splitfold.runtime.errors import ArtifactError

__all__ = ["Outcome", "Reproduction", "reproduce"]


class Outcome(enum.Enum):
    """What became of a failure."""

    SAME = "same"
    """It still fails, in the same way."""
    OTHER = "other"
    """It fails in another way."""
    GONE = "gone"
    """It does not fail any more."""


@dataclass(frozen=True)
class Reproduction:
    """What a reproducer did.

    Attributes:
        outcome: whether it still fails.
        error: what it raised now, or None.
        facts: what was recorded: error, message, layer, pipeline, notes, versions.
        nodes: how many the model has, subgraphs included.
        versions: packages of another version than recorded, as text.
    """

    outcome: Outcome
    error: Exception | None
    facts: Mapping[str, Any]
    nodes: int
    versions: tuple[str, ...]


def reproduce(folder: str | Path) -> Reproduction:
    """Compile what `folder`, written for a failure of `compile`, holds, and compare how it fails.

    It imports the pass classes that the folder names, as running its script would.

    Raises:
        ArtifactError: it is no reproducer, files of it are missing, or a pass cannot be imported.
    """
    place = Path(folder)
    if not place.is_dir():
        raise ArtifactError(f"{place} is no folder: name the folder of a reproducer.")
    facts = read_facts(place)
    case = read_case(place, facts)
    error: Exception | None = None
    try:
        compile(
            case.model,
            case.feeds,
            pipeline=case.steps,
            target=case.target,
            calibration=list(case.batches) or None,
            tolerance=case.tolerance,
            unrealised=case.unrealised,
            speed=None,
            reproducers=None,
        )
    except Exception as raised:
        error = raised
    nodes = sum(len(graph) for graph in case.model.graphs())
    return Reproduction(_outcome(error, facts), error, facts, nodes, tuple(_differing(facts)))


def _outcome(error: Exception | None, facts: Mapping[str, Any]) -> Outcome:
    if error is None:
        return Outcome.GONE
    same = Signature.of(error) == Signature(**facts["signature"])
    return Outcome.SAME if same else Outcome.OTHER


def _differing(facts: Mapping[str, Any]) -> list[str]:
    now = {name: installed_version(name) for name in facts["versions"]}
    now["python"] = platform.python_version()
    then = facts["versions"].items()
    return [f"{name} was {version}, is {now[name]}" for name, version in then if version != now[name]]
