# SPDX-License-Identifier: Apache-2.0
"""Plans of precisions in the manifest: named by digest, not by path, and held whole, so that an artifact can
be made again without their files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from splitfold.passes.assign_precision import AssignPrecisionPass
from splitfold.passes.base import Pass
from splitfold.passes.pipeline import PassRecord, Pipeline
from splitfold.passes.plan import EDITED

__all__ = [
    "copy_plans",
    "named_by_digest",
    "plans_values",
    "with_plan_files",
    "with_plans_in",
    "with_recorded_plans",
]

_SHOWN = 16
"""Digits of a digest that stand in a pipeline's text."""


def named_by_digest(steps: Pipeline, records: Sequence[PassRecord]) -> tuple[Pipeline, list[PassRecord]]:
    """Return the pipeline and its records with digests in the place of the paths of plans."""
    named, told = [], []
    for step, record in zip(steps, records, strict=True):
        changed = step
        if isinstance(step, AssignPrecisionPass) and step.plan and record.plan is not None:
            changed = dataclasses.replace(step, plan=record.plan.digest[:_SHOWN])
        named.append(changed)
        told.append(record if changed is step else dataclasses.replace(record, text=str(changed)))
    return Pipeline(tuple(named)), told


def plans_values(records: Sequence[PassRecord]) -> dict[str, Any]:
    """Return ``{"plans": plan by digest}`` as plain JSON values; nothing where no plan was carried out."""
    plans = {
        record.plan.digest: {
            "signal": record.plan.signal,
            "budget": list(record.plan.budget),
            "edited": record.plan.edited,
            "layers": {layer.name: str(layer.precision) for layer in record.plan.layers},
        }
        for record in records
        if record.plan is not None
    }
    return {"plans": plans} if plans else {}


def with_plan_files(manifest: Mapping[str, Any], steps: Pipeline, folder: Path) -> Pipeline:
    """Return `steps` with paths in the place of the digests of plans that `manifest` holds, whose files are
    written into `folder`."""
    files = {digest: _write(folder, digest, plan) for digest, plan in manifest.get("plans", {}).items()}

    def placed(step: Pass) -> Pass:
        if not isinstance(step, AssignPrecisionPass) or not step.plan:
            return step
        found = [file for digest, file in files.items() if digest.startswith(step.plan)]
        return dataclasses.replace(step, plan=str(found[0])) if found else step

    return Pipeline(tuple(placed(step) for step in steps))


def with_recorded_plans(manifest: Mapping[str, Any], steps: Pipeline, folder: Path) -> Pipeline:
    """Return `steps` with the recorded plans, as files in `folder`, also for passes that would make one."""
    digests = [record.get("plan") for record in manifest["records"]]
    named = [
        dataclasses.replace(step, plan=digest) if isinstance(step, AssignPrecisionPass) and digest else step
        for step, digest in zip(steps, digests, strict=True)
    ]
    return with_plan_files(manifest, Pipeline(tuple(named)), folder)


def copy_plans(steps: Pipeline, folder: Path) -> Pipeline:
    """Copy the plans that `steps` name into `folder`, and return the pipeline with their names there; one
    that cannot be read stays named as it is."""
    named: list[Pass] = []
    for number, step in enumerate(steps):
        file = Path(step.plan) if isinstance(step, AssignPrecisionPass) and step.plan else None
        if isinstance(step, AssignPrecisionPass) and file is not None and file.is_file():
            name = f"plan-{number:02}{file.suffix}"
            (folder / name).write_bytes(file.read_bytes())
            named.append(dataclasses.replace(step, plan=name))
        else:
            named.append(step)
    return Pipeline(tuple(named))


def with_plans_in(steps: Pipeline, folder: Path) -> Pipeline:
    """Return `steps` with the paths of those plans that lie in `folder`."""
    return Pipeline(
        tuple(
            dataclasses.replace(step, plan=str(folder / step.plan))
            if isinstance(step, AssignPrecisionPass) and step.plan and (folder / step.plan).is_file()
            else step
            for step in steps
        )
    )


def _write(folder: Path, digest: str, plan: Mapping[str, Any]) -> Path:
    file = folder / f"{digest[:_SHOWN]}.json"
    held = {
        "signal": plan["signal"],
        "budget": plan["budget"],
        "digest": EDITED if plan.get("edited") else digest,
        "layers": [{"name": name, "precision": word} for name, word in plan["layers"].items()],
    }
    file.write_text(json.dumps(held, ensure_ascii=False), encoding="utf-8")
    return file
