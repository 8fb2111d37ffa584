# SPDX-License-Identifier: Apache-2.0
"""The manifest: everything that is needed to say how an artifact came about, and to make it again.

No times, no machine, no paths.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from splitfold.compiler.plan_record import plans_values
from splitfold.compiler.realisation import Realisation
from splitfold.passes.opset import default_opset
from splitfold.passes.pipeline import PassRecord, Pipeline
from splitfold.runtime.compare import Deviation
from splitfold.runtime.feeds import model_inputs

__all__ = ["FORMAT", "build_manifest", "installed_version", "record_values", "versions"]

FORMAT = 1
_PACKAGES = ("numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "splitfold")


def installed_version(package: str) -> str:
    """Return the installed version of `package`, or ``unknown``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that decide what comes out."""
    return {name: installed_version(name) for name in _PACKAGES}


def build_manifest(
    model: ir.Model,
    pipeline: Pipeline,
    records: Sequence[PassRecord],
    realised: Sequence[Realisation],
    deviations: Mapping[str, Deviation],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the manifest as plain JSON values.

    Args:
        model: the result.
        pipeline: the pipeline that really ran, exclusions added by the compiler included.
        records: what each pass did.
        realised: which kernel each low-bit layer runs in.
        deviations: of each output from the reference.
        facts: target, digests of source, calibration data and feeds, metric.
    """
    return {
        "format": FORMAT,
        "pipeline": str(pipeline),
        "opset": default_opset(model),
        "versions": versions(),
        "signature": {
            "inputs": [_signature(value) for value in model_inputs(model)],
            "outputs": [_signature(value) for value in model.graph.outputs],
        },
        "records": [record_values(record) for record in records],
        **plans_values(records),
        "realised": {item.layer: {"kernel": item.kernel, "low_bit": item.realised} for item in realised},
        "deviation": {name: _finite(dataclasses.asdict(found)) for name, found in deviations.items()},
        **facts,
    }


def _signature(value: ir.Value) -> dict[str, Any]:
    shape = (
        None
        if value.shape is None
        else [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    )
    return {
        "name": value.name,
        "dtype": value.dtype.name if value.dtype is not None else None,
        "shape": shape,
    }


def record_values(record: PassRecord) -> dict[str, Any]:
    """Return a record as plain JSON values, without its time."""
    data = dataclasses.asdict(record)
    data.pop("seconds")
    if data.pop("plan") is not None and record.plan is not None:
        data["plan"] = record.plan.digest
    data["applied"] = [list(item) for item in record.applied]
    data["skipped"] = [list(item) for item in record.skipped]
    data["missed"] = [list(item) for item in record.missed]
    data["measured"] = _finite({layer: round(found, 2) for layer, found in record.measured.items()})
    data["notes"] = list(record.notes)
    data["deviation"] = None if record.deviation is None else _finite(dataclasses.asdict(record.deviation))
    return data


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` with infinities as text, which JSON lacks, and ten significant digits."""
    return {
        key: value
        if not isinstance(value, float)
        else (float(f"{value:.10g}") if math.isfinite(value) else str(value))
        for key, value in values.items()
    }
