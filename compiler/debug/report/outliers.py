# SPDX-License-Identifier: Apache-2.0
"""Outliers of both models, for the report: the layers that have most, and where attention looks."""

from __future__ import annotations

import logging

import onnx_ir as ir

from splitfold.compiler.debug.outliers.measurement import measure_outliers
from splitfold.compiler.debug.outliers.results import Outliers
from splitfold.compiler.debug.report.data import AttentionRow, OutlierRow
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.errors import SplitfoldError
from splitfold.runtime.target import Target

__all__ = ["outlier_rows"]

logger = logging.getLogger(__name__)

_MOST = 10
"""Layers that are shown."""


def outlier_rows(
    before: ir.Model, after: ir.Model, data: Calibration | None, target: Target, missing: dict[str, list[str]]
) -> tuple[tuple[OutlierRow, ...], tuple[AttentionRow, ...]]:
    """Return the layers of largest infinity norm in the original, and every attention block of either model;
    nothing where there is no data, and a reason in `missing` where a model does not run."""
    if data is None:
        return (), ()
    try:
        was, now = (measure_outliers(model, data, target=target) for model in (before, after))
    except SplitfoldError as error:
        logger.warning("no outliers in the report: %s", error)
        missing.setdefault(str(error), []).append("outliers")
        return (), ()
    return _layers(was, now), _blocks(was, now)


def _layers(was: Outliers, now: Outliers) -> tuple[OutlierRow, ...]:
    then = now.by_layer()
    rows = []
    for layer in sorted(was.by_layer().values(), key=lambda it: -it.infinity_norm)[:_MOST]:
        same = then.get(layer.layer)
        rows.append(
            OutlierRow(
                layer.layer,
                layer.what,
                layer.infinity_norm,
                same.infinity_norm if same is not None else None,
                layer.kurtosis,
                same.kurtosis if same is not None else None,
            )
        )
    return tuple(rows)


def _blocks(was: Outliers, now: Outliers) -> tuple[AttentionRow, ...]:
    first, then = ({block.layer: block for block in found.attention} for found in (was, now))
    rows = []
    for name in dict.fromkeys((*first, *then)):
        a, b = first.get(name), then.get(name)
        rows.append(
            AttentionRow(
                name,
                a.first if a is not None else None,
                b.first if b is not None else None,
                a.zeros if a is not None else None,
                b.zeros if b is not None else None,
            )
        )
    return tuple(rows)
