# SPDX-License-Identifier: Apache-2.0
"""Pipelines that leave layers in float, or carry them otherwise: the layer is excluded from every pass that
would take it up."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from splitfold.passes.base import Contract, LayerPass, Pass
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.fold_scales import FoldScalesPass
from splitfold.passes.legalize import LegalizePass
from splitfold.passes.pipeline import PassRecord, Pipeline
from splitfold.passes.quantize_dynamic import QuantizeDynamicPass
from splitfold.passes.quantize_embeddings import QuantizeEmbeddingsPass
from splitfold.passes.quantize_weights import QuantizeWeightsPass
from splitfold.passes.split_activations import SplitActivationsPass
from splitfold.passes.split_layers import SplitLayersPass
from splitfold.passes.split_outliers import SplitOutliersPass

__all__ = ["bare", "in_float", "in_int8", "lowered_by", "without_low_bits"]

_PREPARING = (FoldScalesPass, SplitActivationsPass, SplitLayersPass, SplitOutliersPass)
"""Exact passes that only low precision needs."""
_LEAST_SQNR = 15.0
"""dB that a layer's own output keeps in dynamic int8: what the preset `int8` asks for."""


def _lowers(step: Pass) -> bool:
    return step.contract is Contract.LOSSY or isinstance(step, _PREPARING)


def lowered_by(steps: Pipeline, records: Sequence[PassRecord]) -> dict[str, str]:
    """Return, by layer that a lossy pass changed and that can be excluded from it, the name of the pass."""
    return {
        layer: step.name
        for step, record in zip(steps, records, strict=True)
        if isinstance(step, LayerPass) and step.contract is Contract.LOSSY
        for layer, _ in record.applied
    }


def in_int8(steps: Pipeline, records: Sequence[PassRecord], layers: Collection[str]) -> Pipeline:
    """Return the pipeline with those of `layers` that have weights in blocks in dynamic int8 instead, where
    their own output allows it, and the others of `layers` in float."""
    blocks = {
        layer
        for step, record in zip(steps, records, strict=True)
        if isinstance(step, QuantizeWeightsPass)
        for layer, _ in record.applied
        if layer in layers
    }
    changed: list[Pass] = []
    for step, record in zip(in_float(steps, records, layers), records, strict=True):
        changed.append(step)
        own = tuple(dict.fromkeys(layer for layer, _ in record.applied if layer in blocks))
        if own and isinstance(step, QuantizeWeightsPass):
            changed.append(QuantizeDynamicPass(only=own, min_sqnr=_LEAST_SQNR))
    return Pipeline(tuple(changed))


def in_float(steps: Pipeline, records: Sequence[PassRecord], layers: Collection[str]) -> Pipeline:
    """Return the pipeline with `layers` excluded from each pass that lowers precision, or prepares for it.

    A pass is told of a layer that it changed or considered, and of one that an earlier pass had changed: it
    would now be next to take it up.
    """
    changed, freed = [], dict[str, None]()
    for step, record in zip(steps, records, strict=True):
        if isinstance(step, LayerPass) and _lowers(step):
            told = dict.fromkeys(layer for layer, _ in (*record.applied, *record.skipped) if layer in layers)
            if not isinstance(step, QuantizeEmbeddingsPass):
                told |= freed
            if step.contract is Contract.LOSSY:
                freed |= dict.fromkeys(layer for layer, _ in record.applied if layer in layers)
            if told:
                step = dataclasses.replace(step, exclude=tuple(dict.fromkeys((*step.exclude, *told))))
        changed.append(step)
    return Pipeline(tuple(changed))


def without_low_bits(steps: Pipeline) -> Pipeline:
    """Return the pipeline without the passes that lower precision, and those that prepare for it."""
    return Pipeline(tuple(step for step in steps if not _lowers(step)))


def bare(steps: Pipeline) -> Pipeline:
    """Return what every compilation needs of the pipeline: canonical form and legalization."""
    return Pipeline(tuple(step for step in steps if isinstance(step, CanonicalizePass | LegalizePass)))
