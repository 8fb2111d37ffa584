# SPDX-License-Identifier: Apache-2.0
"""Outliers in the manifest: what an attention substitution did to them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir

from splitfold.compiler.debug.outliers.measurement import measure_outliers
from splitfold.compiler.debug.outliers.results import Outliers
from splitfold.passes.base import Contract
from splitfold.passes.pipeline import PassRecord
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.errors import SplitfoldError
from splitfold.runtime.feeds import Feeds
from splitfold.runtime.target import Target

__all__ = ["first_batches", "outlier_values"]

logger = logging.getLogger(__name__)

_BATCHES = 2
"""Batches that are run, at most."""


def outlier_values(
    before: ir.Model,
    after: ir.Model,
    records: Sequence[PassRecord],
    calibration: Calibration | None,
    target: Target,
) -> dict[str, Any]:
    """Return ``{"outliers": {"before": ..., "after": ...}}`` as JSON: of each model the largest infinity
    norm, the mean kurtosis, and the shares of attention's probability that go to the first token and that
    are exactly zero.

    Empty where no pass put another function in the place of attention, or there is no calibration data.
    Where a model cannot be measured, as one with operators that the runtime lacks, the reason stands there
    instead: a compilation does not fail for it.
    """
    replaced = any(record.contract == Contract.SEMANTIC.value and record.applied for record in records)
    if not replaced or calibration is None:
        return {}
    data = first_batches(calibration, _BATCHES)
    models = {"before": before, "after": after}
    try:
        found = {word: measure_outliers(model, data, target=target) for word, model in models.items()}
    except SplitfoldError as error:
        logger.warning("the outliers were not measured: %s", error)
        return {"outliers": {"not_measured": str(error)}}
    return {"outliers": {word: _values(item) for word, item in found.items()}}


def first_batches(data: Calibration, count: int) -> Calibration:
    """Return the first `count` batches of `data`."""

    def first() -> Iterator[Feeds]:
        return itertools.islice(iter(data), count)

    return Calibration(first)


def _values(found: Outliers) -> dict[str, float | int | None]:
    blocks = found.attention
    return {
        "samples": found.samples,
        "infinity_norm": _short(found.infinity_norm),
        "kurtosis": _short(found.kurtosis),
        "first_token": _short(sum(it.first for it in blocks) / len(blocks)) if blocks else None,
        "zeros": _short(sum(it.zeros for it in blocks) / len(blocks)) if blocks else None,
    }


def _short(value: float) -> float:
    """Four digits: the order of a sum may differ between two runs."""
    return float(f"{value:.4g}")
