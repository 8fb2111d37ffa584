# SPDX-License-Identifier: Apache-2.0
"""Collecting what a report says: bounded work, and whatever cannot be had is named instead."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from splitfold.compiler.compiled import Compiled
from splitfold.compiler.debug.drift.measurement import Drift, drift
from splitfold.compiler.debug.report.data import (
    Distribution,
    DriftFacts,
    DriftPoint,
    LayerRow,
    OutputRow,
    Precision,
    ReportData,
    Verdict,
)
from splitfold.compiler.debug.report.distributions import distributions, is_quantized
from splitfold.compiler.debug.report.environment import digest_rows, environment_rows
from splitfold.compiler.debug.report.formatting import decibels
from splitfold.compiler.debug.report.layers import layer_rows, named_layers
from splitfold.compiler.debug.report.neighbourhood import graph_json
from splitfold.compiler.debug.report.operators import operator_rows
from splitfold.compiler.debug.report.outliers import outlier_rows
from splitfold.compiler.debug.report.side import Side, make_side
from splitfold.compiler.debug.report.steps import deviation_from, output_row, pass_rows
from splitfold.compiler.inspection import constant_bytes
from splitfold.compiler.outlier_record import first_batches
from splitfold.passes.base import Contract
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.compare import Deviation
from splitfold.runtime.errors import SplitfoldError
from splitfold.runtime.session import optimized_graph

__all__ = ["collect"]

logger = logging.getLogger(__name__)

_BATCHES = 2
"""Batches that a report runs, at most."""
_WORST = 8
"""Layers whose histograms are drawn."""


def collect(compiled: Compiled) -> ReportData:
    """Run what needs to be run, and return all that the report of `compiled` says."""
    missing: dict[str, list[str]] = {}
    before, after = _sides(compiled, missing)
    data = _data(compiled)
    found = _drift(compiled, before.model, data, missing)
    layers = layer_rows(before, after, compiled.records, compiled.manifest, found)
    index = {row.name: number for number, row in enumerate(layers)}
    verdict, words = _verdict(compiled.manifest)
    outliers, attention = outlier_rows(before.model, after.model, data, compiled.target, missing)
    return ReportData(
        title=_title(compiled),
        pipeline=str(compiled.manifest["pipeline"]),
        target=compiled.target.name,
        verdict=verdict,
        verdict_words=words,
        warnings=_warnings(compiled),
        outputs=_outputs(compiled.manifest),
        metric=_metric(compiled.manifest),
        size=(constant_bytes(before.model), constant_bytes(after.model)),
        nodes=(_count(before.model), _count(after.model)),
        precisions=_precisions(layers),
        kernels=_kernels(compiled.manifest),
        passes=pass_rows(compiled.records),
        layers=layers,
        drift=_points(found, index),
        drift_facts=_facts(found),
        distributions=_distributions(layers, index, before, after, compiled, data, found),
        outliers=outliers,
        attention=attention,
        operators=operator_rows(before, after, compiled.target),
        graph=graph_json(before, after, [row.name for row in layers]),
        environment=environment_rows(compiled.manifest, compiled.target),
        digests=digest_rows(compiled.manifest),
        missing=tuple(f"{', '.join(what)}: {why.rstrip('.')}" for why, what in missing.items()),
    )


def _sides(compiled: Compiled, missing: dict[str, list[str]]) -> tuple[Side, Side]:
    sides = []
    for word, model in (("original", compiled.source.model), ("compiled", compiled.model)):
        runtime = None
        try:
            if compiled.source.opens:
                runtime = optimized_graph(model, compiled.target)
            else:
                missing.setdefault(compiled.source.unverified, []).append(f"kernels of the {word} model")
        except SplitfoldError as error:
            missing.setdefault(str(error), []).append(f"kernels of the {word} model")
        sides.append(make_side(model, runtime))
    return sides[0], sides[1]


def _data(compiled: Compiled) -> Calibration | None:
    """Return the first batches of the calibration data, else the example inputs; None where the model cannot
    be run."""
    source = compiled.source
    if not source.opens:
        return None
    data = source.calibration
    if data is None:
        return Calibration.of([source.feeds])
    return first_batches(data, _BATCHES)


def _drift(
    compiled: Compiled, reference: ir.Model, data: Calibration | None, missing: dict[str, list[str]]
) -> Drift | None:
    if data is None or compiled.source.unverified:
        what = "drift" if data is not None else "drift and histograms of activations"
        missing.setdefault(compiled.source.unverified, []).append(what)
        return None
    try:
        return drift(reference, compiled.model, data, target=compiled.target)
    except SplitfoldError as error:
        logger.warning("no drift in the report: %s", error)
        missing.setdefault(str(error), []).append("drift")
        return None


def _points(found: Drift | None, index: Mapping[str, int]) -> tuple[DriftPoint, ...]:
    if found is None:
        return ()
    rank = {point.value: place + 1 for place, point in enumerate(found.ranked())}
    return tuple(
        DriftPoint(
            layer=next((index[layer] for layer in named_layers(point.layer, index)), -1),
            operator=point.operator,
            value=point.value,
            depth=point.depth,
            accumulated_db=decibels(point.accumulated),
            local_db=None if point.local is None else decibels(point.local),
            impact_db=None if point.impact is None else decibels(point.impact),
            exact=point.accumulated.max_abs == 0,
            source=point.source,
            rank=rank[point.value],
            note=point.note,
        )
        for point in found.points
    )


def _facts(found: Drift | None) -> DriftFacts | None:
    return None if found is None else DriftFacts(found.batches, found.padding, _rows(found.outputs))


def _distributions(
    layers: Sequence[LayerRow],
    index: Mapping[str, int],
    before: Side,
    after: Side,
    compiled: Compiled,
    data: Calibration | None,
    found: Drift | None,
) -> tuple[Distribution, ...]:
    blamed = [] if found is None else [name for p in found.ranked() for name in named_layers(p.layer, index)]
    measured = {
        name: event.sqnr_db for row in layers for name, event in _events(row) if event.sqnr_db is not None
    }
    by_measure = sorted(measured, key=lambda name: measured[name])
    by_size = [row.name for row in sorted(layers, key=lambda row: -row.after.size if row.after else 0)]
    ordered = dict.fromkeys((*blamed, *by_measure, *by_size))
    chosen = [name for name in ordered if is_quantized(after, name)][:_WORST]
    return distributions(chosen, index, before, after, data, compiled.target)


def _events(row: LayerRow) -> Iterator[tuple[str, Any]]:
    return ((row.name, event) for event in row.history)


def _title(compiled: Compiled) -> str:
    path = compiled.source.path
    return path.stem if path is not None else compiled.source.model.graph.name or "model"


def _outputs(manifest: Mapping[str, Any]) -> tuple[OutputRow, ...]:
    return _rows({name: deviation_from(found) for name, found in manifest["deviation"].items()})


def _rows(found: Mapping[str, Deviation]) -> tuple[OutputRow, ...]:
    rows = [output_row(name, item) for name, item in found.items()]
    return tuple(sorted(rows, key=lambda row: (row.equal, row.cosine)))


def _metric(manifest: Mapping[str, Any]) -> tuple[float, float] | None:
    found = manifest.get("metric")
    return None if found is None else (float(found["before"]), float(found["after"]))


def _verdict(manifest: Mapping[str, Any]) -> tuple[Verdict, str]:
    if reason := manifest.get("unverified"):
        return Verdict.UNVERIFIED, f"The outputs were not compared with the original's: {reason}."
    if manifest.get("feeds_synthetic"):
        words = "The outputs were compared with the original's, but on made-up inputs."
        return Verdict.SYNTHETIC, words
    return (
        Verdict.VERIFIED,
        "The outputs, as deployed, were compared with the original's on the example inputs.",
    )


def _warnings(compiled: Compiled) -> tuple[str, ...]:
    manifest, found = compiled.manifest, []
    lossy = [record for record in compiled.records if record.contract == Contract.LOSSY.value]
    if lossy and not any(record.applied for record in lossy):
        found.append("Nothing was quantized: every candidate was skipped; the passes below say why.")
    slow = [layer for layer, item in manifest.get("realised", {}).items() if not item["low_bit"]]
    if slow:
        found.append(f"{len(slow)} low-bit layers are computed by no low-bit kernel: {', '.join(slow[:3])}.")
    if put_back := manifest.get("put_back", {}):
        found.append(f"{len(put_back)} layers were put back to float: {', '.join(list(put_back)[:3])}.")
    if compiled.speed is not None and compiled.speed.slow:
        found.append(f"Speed: {compiled.speed.statement}")
    return tuple(found)


def _kernels(manifest: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    counts = Counter(str(item["kernel"]) for item in manifest.get("realised", {}).values() if item["low_bit"])
    return tuple(counts.most_common())


def _precisions(layers: Sequence[LayerRow]) -> tuple[tuple[Precision, int, int, int, int], ...]:
    sums = {precision: [0, 0, 0, 0] for precision in Precision}
    for row in layers:
        for at, held in enumerate((row.before, row.after)):
            if held is not None and held.size:
                sums[held.precision][at] += held.size
                sums[held.precision][2 + at] += 1
    return tuple((key, a, b, c, d) for key, (a, b, c, d) in sums.items() if a or b)


def _count(model: ir.Model) -> int:
    return sum(len(graph) for graph in model.graphs())
