# SPDX-License-Identifier: Apache-2.0
"""Precision plans: which layer computes in what, and why; a file that a person can edit and give back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitfold.passes.errors import SpecError
from splitfold.passes.precision import Precision
from splitfold.runtime.errors import did_you_mean

__all__ = ["EDITED", "PlannedLayer", "PrecisionPlan", "plan_text", "read_plan"]

_HEADER = (
    "# A plan of precisions. Change a precision and give the file back: assign-precision{plan=FILE}.\n"
    "# Only name and precision of a layer decide, and make the digest; layers that are left out stay as they "
    "are.\n"
)
EDITED = "edited"
"""In the place of the digest of a plan whose precisions were changed after it was made."""
_PLAN_KEYS = ("signal", "budget", "bytes", "weight-bits", "loss", "digest", "layers")
_LAYER_KEYS = ("name", "precision", "weights", "bytes", "score", "loss", "why")


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of a plan.

    Attributes:
        name: user-facing name.
        precision: what it is to compute in.
        weights: how many it has.
        bytes: of weight, bias and grids in that precision; a weight that layers share counts at the first.
        score: of the signal, higher where bits matter more.
        loss: expected loss, in the signal's terms.
        why: what the choices of next higher and next lower loss would have changed.
    """

    name: str
    precision: Precision
    weights: int = 0
    bytes: int = 0
    score: float = math.nan
    loss: float = math.nan
    why: str = ""


@dataclass(frozen=True)
class PrecisionPlan:
    """A precision for each of some layers.

    Attributes:
        layers: in the order of execution.
        signal: what told the layers apart; empty where a person did.
        budget: text forms of the limits that it keeps.
        weight_bits: bits a weight as stored, scales, zero points and padding included; NaN where not known.
        edited: whether precisions were changed after the plan was made: its numbers are those of another one.
    """

    layers: tuple[PlannedLayer, ...]
    signal: str = ""
    budget: tuple[str, ...] = ()
    weight_bits: float = math.nan
    edited: bool = False

    @property
    def digest(self) -> str:
        """SHA-256 over name and precision of each layer: what the plan does, whatever made it."""
        rows = sorted((layer.name, str(layer.precision)) for layer in self.layers)
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()

    @property
    def bytes(self) -> int:
        """Bytes of the plan's layers."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def loss(self) -> float:
        """Expected loss: the sum over the layers."""
        return math.fsum(layer.loss for layer in self.layers)

    @property
    def precisions(self) -> dict[str, Precision]:
        """The precision of each layer."""
        return {layer.name: layer.precision for layer in self.layers}

    def counts(self) -> dict[str, int]:
        """Return how many layers have each precision, by its text form."""
        found: dict[str, int] = {}
        for layer in self.layers:
            found[str(layer.precision)] = found.get(str(layer.precision), 0) + 1
        return dict(sorted(found.items()))

    def check_layers(self, known: Sequence[str]) -> None:
        """Raise `SpecError` for a layer that is not among `known`."""
        for layer in self.layers:
            if layer.name not in known:
                raise SpecError(
                    f"the plan names layer '{layer.name}', which the model does not have."
                    f"{did_you_mean(layer.name, known)}"
                )


def plan_text(plan: PrecisionPlan) -> str:
    """Return the file form of a plan, TOML: the same plan gives the same bytes; `read_plan` reads it back."""
    lines = [
        _HEADER,
        f"signal = {_toml(plan.signal)}",
        f"budget = [{', '.join(map(_toml, plan.budget))}]",
        f"bytes = {plan.bytes}",
        f"weight-bits = {_toml(plan.weight_bits)}",
        f"loss = {_toml(plan.loss)}",
        f"digest = {_toml(EDITED if plan.edited else plan.digest)}",
        "layers = [",
        *(f"  {{ {_row(layer)} }}," for layer in plan.layers),
        "]",
    ]
    return "\n".join(lines) + "\n"


def _row(layer: PlannedLayer) -> str:
    cells: dict[str, str | float] = {
        "name": layer.name,
        "precision": str(layer.precision),
        "weights": layer.weights,
        "bytes": layer.bytes,
        "score": layer.score,
        "loss": layer.loss,
        "why": layer.why,
    }
    return ", ".join(f"{key} = {_toml(value)}" for key, value in cells.items())


def _toml(value: str | float) -> str:
    if isinstance(value, str):  # a basic string of TOML is escaped as in JSON
        return json.dumps(value, ensure_ascii=False)
    return repr(value)


def read_plan(path: str | Path) -> PrecisionPlan:
    """Return the plan of a file: TOML as `plan_text` writes it, or JSON of the same keys.

    Raises:
        SpecError: no such file, not TOML or JSON, an unknown key or precision, a layer twice or without one.
    """
    file = Path(path)
    table = _load(file)
    _check_keys(file, table, _PLAN_KEYS, "a plan")
    rows = table.get("layers")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise SpecError(f'{file}: a plan holds layers = [{{ name = "...", precision = "w4" }}, ...].')
    layers = tuple(_layer(f"{file}: layers[{position}]", row) for position, row in enumerate(rows))
    names = [layer.name for layer in layers]
    if twice := [name for position, name in enumerate(names) if name in names[:position]]:
        raise SpecError(f"{file}: layer '{twice[0]}' stands there twice.")
    budget = table.get("budget", [])
    plan = PrecisionPlan(
        layers,
        str(table.get("signal", "")),
        tuple(map(str, budget)) if isinstance(budget, list) else (str(budget),),
        _number(table.get("weight-bits", math.nan), f"{file}: weight-bits"),
    )
    return dataclasses.replace(plan, edited=table.get("digest", plan.digest) != plan.digest)


def _load(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise SpecError(f"no such plan: {file}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read the plan {file}: {error}") from error
    try:
        table = json.loads(text) if text.lstrip().startswith("{") else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise SpecError(f"{file} is neither TOML nor JSON: {error}") from error
    return dict(table)


def _layer(where: str, row: Mapping[str, Any]) -> PlannedLayer:
    _check_keys(where, row, _LAYER_KEYS, "a layer of a plan")
    name, word = row.get("name"), row.get("precision")
    if not isinstance(name, str) or not isinstance(word, str):
        missing = "name" if not isinstance(name, str) else f"precision (of '{name}')"
        raise SpecError(f"{where}: {missing} is missing or is no text.")
    try:
        precision = Precision.parse(word)
    except SpecError as error:
        raise SpecError(f"{where} ('{name}'): {error}") from error
    return PlannedLayer(
        name,
        precision,
        int(_number(row.get("weights", 0), f"{where}: weights")),
        int(_number(row.get("bytes", 0), f"{where}: bytes")),
        _number(row.get("score", math.nan), f"{where}: score"),
        _number(row.get("loss", math.nan), f"{where}: loss"),
        str(row.get("why", "")),
    )


def _check_keys(where: object, table: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for key in table:
        if key not in known:
            raise SpecError(
                f"{where}: unknown key '{key}'.{did_you_mean(key, known)} {what} holds {', '.join(known)}."
            )


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SpecError(f"{where} is {value!r}, not a number.")
    return value
