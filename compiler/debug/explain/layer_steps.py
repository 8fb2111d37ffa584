# SPDX-License-Identifier: Apache-2.0
"""What the records of a manifest say of one layer, pass by pass."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from splitfold.passes.base import Contract
from splitfold.passes.table import PASSES

__all__ = ["Action", "PassStep", "float_reason", "layer_steps", "put_back", "recorded"]

_Found = TypeVar("_Found")
_EXCLUDED = "excluded by option"


class Action(enum.Enum):
    """What a pass did to a layer."""

    APPLIED = "applied"
    SKIPPED = "skipped"
    MISSED = "missed"
    """One of its patterns nearly fitted."""
    NO_CANDIDATE = "no candidate"


@dataclass(frozen=True)
class PassStep:
    """What one pass did to a layer.

    Attributes:
        name: of the pass.
        action: what it did.
        text: what was done, or why not.
        measured_db: SQNR in dB of the layer's own output in the low-bit form that the pass tried, where it
            measured it.
        lossy: whether the pass trades accuracy.
    """

    name: str
    action: Action
    text: str
    measured_db: float | None
    lossy: bool


def layer_steps(
    names: Sequence[str], manifest: Mapping[str, Any], *, mentioned_only: bool = False
) -> tuple[PassStep, ...]:
    """Return what each recorded pass did to the layer of these names, in order.

    Args:
        names: a layer, or several that were fused into one.
        manifest: of the artifact.
        mentioned_only: leave out the passes that do not name the layer.
    """
    steps: list[PassStep] = []
    for record in manifest.get("records", ()):
        steps += _record_steps(names, record, mentioned_only)
    return tuple(steps)


def _record_steps(
    names: Sequence[str], record: Mapping[str, Any], mentioned_only: bool
) -> Iterable[PassStep]:
    name, lossy = str(record["text"]).partition("{")[0], record.get("contract") == Contract.LOSSY.value
    measured = recorded(names, record.get("measured", {}), None)
    db = None if measured is None else float(measured)
    found = [
        PassStep(name, action, text, db, lossy)
        for action, texts in (
            (Action.APPLIED, _texts(names, record.get("applied", ()))),
            (Action.SKIPPED, _texts(names, record.get("skipped", ()))),
            (Action.MISSED, _missed(names, record.get("missed", ()))),
        )
        for text in texts
    ]
    if found or mentioned_only:
        return found
    takes = next((step.takes for step in PASSES if step.name == name), "")
    return [PassStep(name, Action.NO_CANDIDATE, f"it takes up {takes}", db, lossy)] if takes else []


def _texts(names: Sequence[str], pairs: Iterable[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(str(text) for name, text in pairs if _is_of(names, name)))


def _missed(names: Sequence[str], misses: Iterable[Sequence[str]]) -> list[str]:
    found = [f"not {pattern}: {reason}" for name, pattern, reason in misses if _is_of(names, name)]
    return list(dict.fromkeys(found))


def _is_of(names: Sequence[str], record: str) -> bool:
    """Whether `record`, which names a layer or several joined by a plus, speaks of this one."""
    return record in names or not set(names).isdisjoint(record.split("+"))


def recorded(names: Sequence[str], values: Mapping[str, _Found], default: _Found) -> _Found:
    """Return the value that `values` holds for the layer of these names, or `default`."""
    return next((value for name, value in values.items() if _is_of(names, name)), default)


def put_back(names: Sequence[str], manifest: Mapping[str, Any]) -> str:
    """Return the kernel as which the layer ran before it was put back to float, or an empty text."""
    return str(recorded(names, manifest.get("put_back", {}), ""))


def float_reason(steps: Sequence[PassStep], manifest: Mapping[str, Any]) -> str:
    """Return why a layer that could be held in few bits is in float.

    Args:
        steps: what each pass did to it.
        manifest: of the artifact.
    """
    quantizing = [step for step in steps if step.lossy]
    if not any(record.get("contract") == Contract.LOSSY.value for record in manifest.get("records", ())):
        return "the pipeline has no quantizing pass"
    if reasons := [f"{step.name}: {step.text}" for step in quantizing if step.action is Action.SKIPPED]:
        return "; ".join(dict.fromkeys(reasons))
    later = [step for step in steps if step.action is Action.APPLIED and not step.lossy]
    if later and any(step.action is Action.APPLIED for step in quantizing):
        return f"{later[-1].name}: {later[-1].text}"
    if applied := [f"{step.name}: {step.text}" for step in quantizing if step.action is Action.APPLIED]:
        return "; ".join(applied)  # a simulation, whose weights are still floats
    return "no quantizing pass took it up: " + "; ".join(
        f"{step.name} takes up {step.text.removeprefix('it takes up ')}" for step in quantizing
    )
