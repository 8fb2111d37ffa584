# SPDX-License-Identifier: Apache-2.0
"""`measure_outliers`: activations and attention of a model, on data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from splitfold.compiler.debug.drift.padding import find_padding
from splitfold.compiler.debug.outliers.points import AttentionPoint, attention_points, layer_points
from splitfold.compiler.debug.outliers.results import AttentionOutliers, LayerOutliers, Outliers
from splitfold.compiler.debug.outliers.statistics import AttentionShares, Extremes
from splitfold.compiler.source import read_graph
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.values import forget_names
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.errors import CalibrationError
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.padding import PADDING, Padding
from splitfold.runtime.session import Session
from splitfold.runtime.target import Target

__all__ = ["measure_outliers"]

_AT_ONCE = 32
"""Values that one run keeps."""


def measure_outliers(
    model: object,
    data: object,
    *,
    padding: str | None = PADDING,
    tokens: str = "input_ids",
    delimiters: Sequence[int] = (),
    target: Target | None = None,
) -> Outliers:
    """Measure the outliers of a model's activations, and what its attention looks at.

    Infinity norm and kurtosis are those of Quantizable Transformers (arXiv 2306.12929, section 5), a sample
    at a time: outputs of layers with weights, and inputs of norms. Samples lie along the first axis.

    Args:
        model: `onnx_ir.Model`, `onnx.ModelProto` or path.
        data: calibration data in any form that `compile` takes.
        padding: input of shape [batch, positions] whose zeros mark positions to leave out; None keeps all.
        tokens: input that holds token ids, for `delimiters`.
        delimiters: ids of tokens that separate and mean nothing, such as [CLS], [SEP] and full stops.
        target: where the model runs; default the CPU.

    Raises:
        CaptureError: the model is no ONNX model.
        CalibrationError: the data does not fit, or there is none; `delimiters` without their input.
        ComparisonError: `padding` names no input that can mark it.
        SessionError: the model does not run.
    """
    graph, _ = read_graph(model)
    CanonicalizePass()(graph)
    batches = Calibration.of(data).fitted(graph).checked(graph)
    ignored = find_padding(graph, padding)
    points, (blocks, unseen) = layer_points(graph), attention_points(graph)
    extremes = {point: Extremes() for point in points}
    shares = {block: AttentionShares() for block in blocks}
    names = list(dict.fromkeys([*(it.value for it in points), *(it.value for it in blocks)]))
    forget_names(graph)
    groups = [names[start : start + _AT_ONCE] for start in range(0, len(names), _AT_ONCE)]
    sessions = [Session(graph, target or Target.cpu(), taps=taps) for taps in groups]
    samples = 0
    for feeds in batches:
        samples += len(next(iter(feeds.values())))
        marked = _delimiters(feeds, tokens, delimiters)
        for session, taps in zip(sessions, groups, strict=True):
            found = session.run(feeds, taps)
            for point, extreme in extremes.items():
                for sample in _samples(found.get(point.value), feeds, ignored):
                    extreme.add(sample)
            for block, share in shares.items():
                if block.value in found:
                    _look(share, block, found[block.value], feeds, ignored, marked)
    if not samples:
        raise CalibrationError("the data holds no batch: there is nothing to measure.")
    layers = [
        LayerOutliers(it.layer, it.value, it.what, at.infinity_norm, at.largest, at.kurtosis)
        for it, at in extremes.items()
        if at.samples
    ]
    attention = [_attention(block, share, bool(delimiters)) for block, share in shares.items()]
    return Outliers(tuple(layers), tuple(attention), samples, ignored.input, unseen)


def _samples(array: Array | None, feeds: Feeds, padding: Padding) -> Iterator[Array]:
    """Yield the elements of each sample that are no padding."""
    if array is None or array.ndim == 0:
        return
    count = len(next(iter(feeds.values())))
    if len(array) != count:
        array = array.reshape(count, -1) if array.size % count == 0 else array[None]
    for at, row in enumerate(array):
        alone = {name: given[at : at + 1] for name, given in feeds.items() if given.ndim}
        yield padding.without(alone, row[None])


def _delimiters(feeds: Feeds, tokens: str, ids: Sequence[int]) -> Array | None:
    if not ids:
        return None
    if tokens not in feeds:
        raise CalibrationError(f"delimiters are token ids, but there is no input '{tokens}' with tokens.")
    return np.isin(feeds[tokens], ids)


def _look(
    share: AttentionShares,
    block: AttentionPoint,
    found: Array,
    feeds: Feeds,
    padding: Padding,
    delimiters: Array | None,
) -> None:
    """Count the probabilities of one batch."""
    p = found.reshape(found.shape[0], -1, *found.shape[-2:]) if found.ndim > 2 else found[None, None]
    queries, keys = p.shape[-2:]
    mask = feeds[padding.input] != 0 if padding.input is not None else None
    for at, sample in enumerate(p):
        fits = mask is not None and len(mask) == len(p)
        kept = mask[at] if mask is not None and fits else None
        rows = kept if kept is not None and len(kept) == queries else np.ones(queries, bool)
        columns = kept if kept is not None and len(kept) == keys else np.ones(keys, bool)
        seen = np.tile(columns, (queries, 1))
        if block.causal:
            seen &= np.tri(queries, keys, keys - queries, dtype=bool)
        marked = delimiters[at] if delimiters is not None and delimiters.shape == (len(p), keys) else None
        share.add(sample[:, rows], seen[rows], marked)


def _attention(block: AttentionPoint, share: AttentionShares, named: bool) -> AttentionOutliers:
    delimiters = share.share(share.delimiters) if named else None
    return AttentionOutliers(
        block.layer, share.share(share.first), share.head_shares, delimiters, share.zero_share
    )
