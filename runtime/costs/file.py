# SPDX-License-Identifier: Apache-2.0
"""Kernel costs as a JSON file, and the file that is shipped."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from pathlib import Path
from typing import Any

from splitfold.runtime.costs.kernel import Case, Kernel
from splitfold.runtime.costs.machine import Machine
from splitfold.runtime.costs.table import KernelCosts, Sample
from splitfold.runtime.errors import ArtifactError
from splitfold.runtime.model_file import scratch_folder

__all__ = ["read_costs", "shipped_costs", "write_costs"]

_FORMAT = 1
_DIGITS = 5


def write_costs(costs: KernelCosts, path: str | Path) -> Path:
    """Write `costs` as JSON, all or nothing, and return the path.

    Raises:
        ArtifactError: it cannot be written; what was there before remains.
    """
    file = Path(path)
    rows = [
        {"kernel": str(case.kernel), "shape": list(case.shape), **_rounded(sample)}
        for case, sample in sorted(costs.samples.items(), key=lambda item: _order(item[0]))
    ]
    head = json.dumps({"format": _FORMAT, "machine": dataclasses.asdict(costs.machine)}, ensure_ascii=False)
    lines = ",\n ".join(json.dumps(row) for row in rows)
    with scratch_folder(file) as scratch:
        made = scratch / file.name
        made.write_text(f'{head[:-1]}, "samples": [\n {lines}\n]}}\n', encoding="utf-8")
        made.replace(file)
    return file


def _order(case: Case) -> tuple[str, tuple[int, ...]]:
    return str(case.kernel), case.shape


def _rounded(sample: Sample) -> dict[str, float | int]:
    return {
        "milliseconds": float(f"{sample.milliseconds:.{_DIGITS}g}"),
        "low": float(f"{sample.low:.{_DIGITS}g}"),
        "high": float(f"{sample.high:.{_DIGITS}g}"),
        "runs": sample.runs,
    }


def read_costs(path: str | Path) -> KernelCosts:
    """Return the costs that a file holds.

    Raises:
        ArtifactError: no such file, or it holds no kernel costs; it names what is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"cannot read kernel costs from {path}: {error}") from error
    return _parsed(text, str(path))


@functools.cache
def shipped_costs() -> KernelCosts:
    """Return the costs that come with splitfold: of a common server processor with two cores."""
    file = importlib.resources.files("splitfold.runtime.costs").joinpath("shipped.json")
    return _parsed(file.read_text(encoding="utf-8"), str(file))


def _parsed(text: str, where: str) -> KernelCosts:
    hint = "make it with splitfold calibrate-target."
    try:
        held: Any = json.loads(text)
        if not isinstance(held, dict) or held.get("format") != _FORMAT:
            found = held.get("format") if isinstance(held, dict) else type(held).__name__
            raise ArtifactError(f"{where} holds no kernel costs of format {_FORMAT} ({found}): {hint}")
        machine = Machine(**held["machine"])
        samples = dict(_sample(row) for row in held["samples"])
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(
            f"{where} holds no kernel costs: {type(error).__name__}: {error}; {hint}"
        ) from error
    return KernelCosts(machine, samples)


def _sample(row: dict[str, Any]) -> tuple[Case, Sample]:
    times = [float(row[key]) for key in ("milliseconds", "low", "high")]
    if not all(0 < time < float("inf") for time in times):
        raise ValueError(f"{row['kernel']} {row['shape']}: {times} are no times")
    case = Case(Kernel.parse(str(row["kernel"])), tuple(int(size) for size in row["shape"]))
    return case, Sample(times[0], times[1], times[2], int(row["runs"]))
