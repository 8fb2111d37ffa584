# SPDX-License-Identifier: Apache-2.0
"""What a report says, as plain values: collected once, then drawn and written.

Every field is JSON (numbers, texts, sequences of them); infinite and unknown numbers are None where a field
says so. Bytes are bytes, decibels are 20 log10 of the reference's norm over the error's norm.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "AttentionRow",
    "Distribution",
    "DriftFacts",
    "DriftPoint",
    "Event",
    "EventKind",
    "Group",
    "Held",
    "LayerRow",
    "OperatorRow",
    "OutlierRow",
    "OutputRow",
    "PassRow",
    "Precision",
    "ReportData",
    "Verdict",
]


class Precision(enum.StrEnum):
    """What a layer's weights and activations are held in, as coarse as colours can tell apart."""

    FLOAT = "float32"
    HALF = "float16"
    STATIC = "int8, static activations"
    DYNAMIC = "int8, dynamic activations"
    WEIGHTS = "8-bit weights"
    FOUR = "4-bit weights"
    FEWER = "2-bit weights"
    OTHER = "other constants"

    @property
    def is_low_bit(self) -> bool:
        """Whether weights are held in fewer bits than a float has."""
        return self not in (Precision.FLOAT, Precision.HALF, Precision.OTHER)


class Verdict(enum.StrEnum):
    """How much the compiled model was held against the original."""

    VERIFIED = "verified"
    SYNTHETIC = "verified on made-up inputs"
    UNVERIFIED = "not verified"


class EventKind(enum.StrEnum):
    """What a pass did to a layer."""

    APPLIED = "applied"
    SKIPPED = "skipped"
    TAKEN_BACK = "taken back"


@dataclass(frozen=True)
class OutputRow:
    """How far a value is from its reference; see `splitfold.runtime.compare.Deviation`.

    `sqnr_db` is None where the two are equal, or infinitely apart: `equal` tells which.
    """

    name: str
    cosine: float
    sqnr_db: float | None
    max_abs: float | None
    relative: float | None
    top1: float | None
    equal: bool


@dataclass(frozen=True)
class Group:
    """Layers that met the same: `what` is what was done to them, or the reason why not."""

    what: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class PassRow:
    """One pass; `seconds` is None where it is not known (an artifact read from disk)."""

    name: str
    text: str
    contract: str
    modified: bool
    seconds: float | None
    nodes_before: int
    nodes_after: int
    bytes_before: int
    bytes_after: int
    applied: tuple[Group, ...]
    skipped: tuple[Group, ...]
    notes: tuple[str, ...]
    deviation: OutputRow | None

    @property
    def applied_count(self) -> int:
        """How many layers it was applied to."""
        return sum(len(group.layers) for group in self.applied)

    @property
    def skipped_count(self) -> int:
        """How many candidates it left as they were."""
        return sum(len(group.layers) for group in self.skipped)


@dataclass(frozen=True)
class Held:
    """What a layer's constants are held in, and the operator that runs it (empty where it is not known)."""

    precision: Precision
    text: str
    size: int
    kernel: str


@dataclass(frozen=True)
class Event:
    """What one pass did to a layer."""

    step: str
    kind: EventKind
    what: str
    sqnr_db: float | None = None
    """Of the layer's output, as the pass measured it."""


@dataclass(frozen=True)
class LayerRow:
    """One layer of the user's model.

    Attributes:
        name: user-facing name.
        operator: the operator that holds its weight, else all of its operators.
        shape: of its weight; empty where it has none.
        before, after: None where the model has no node of the layer (any more).
        low_bit: whether a low-bit kernel computes it; None where it holds nothing in low precision.
        history: what each pass did to it.
        accumulated_db, local_db: SQNR of its output, both models running by themselves, and the layer alone
            on the reference's inputs; None where it is unknown or infinite.
        exact: whether its output is equal in both models.
        blame: what the drift says of it, or empty.
    """

    name: str
    operator: str
    shape: tuple[int, ...]
    before: Held | None
    after: Held | None
    low_bit: bool | None
    history: tuple[Event, ...] = ()
    accumulated_db: float | None = None
    local_db: float | None = None
    exact: bool = False
    blame: str = ""


@dataclass(frozen=True)
class DriftPoint:
    """A value that both models compute.

    Attributes:
        layer: index into `ReportData.layers`, -1 for none.
        operator, value: of the original model.
        depth: longest way from an input, in points.
        accumulated_db, local_db, impact_db: SQNR; None where it is unknown or infinite.
        exact: whether the value is equal in both models.
        source: whether an error arises here.
        rank: place by blame, from 1.
        note: what can be seen of the cause.
    """

    layer: int
    operator: str
    value: str
    depth: int
    accumulated_db: float | None
    local_db: float | None
    impact_db: float | None
    exact: bool
    source: bool
    rank: int
    note: str


@dataclass(frozen=True)
class DriftFacts:
    """What the drift was measured over.

    Attributes:
        batches: how many.
        padding: input whose zeros mark positions that were left out, or None.
        outputs: deviation of each output, the worst first.
    """

    batches: int
    padding: str | None
    outputs: tuple[OutputRow, ...]


@dataclass(frozen=True)
class Distribution:
    """A histogram with the grid that the values are rounded to.

    Attributes:
        layer: index into `ReportData.layers`.
        title: which values these are.
        low, high: extremes seen; the bins between them are equal.
        counts: elements by bin.
        original: elements by bin of the same weight before compilation, or None.
        ranges: (low, high) of what the grid can represent: one, or the narrowest, the median and the widest
            of many; empty where there is no grid.
        zero: the value of the grid's zero point is 0; the code that stands for it, or None for many.
        step: distance of neighbouring values of the (median) grid, or None.
        clipped: share of the elements that the grid cuts off, or None.
        words: the grid in words.
    """

    layer: int
    title: str
    low: float
    high: float
    counts: tuple[int, ...]
    original: tuple[int, ...] | None
    ranges: tuple[tuple[float, float], ...]
    zero: int | None
    step: float | None
    clipped: float | None
    words: str


@dataclass(frozen=True)
class OperatorRow:
    """How often the runtime runs an operator; None where the model could not be opened."""

    operator: str
    before: int | None
    after: int | None
    provider: str
    low_bit: bool


@dataclass(frozen=True)
class OutlierRow:
    """Activations of one layer, (before, after); None where the compiled model shows none of them as floats.

    Attributes:
        layer: its name.
        what: which of its values.
        norm_before, norm_after: mean over samples of the largest magnitude.
        kurtosis_before, kurtosis_after: mean over samples; 3 for a normal distribution.
    """

    layer: str
    what: str
    norm_before: float
    norm_after: float | None
    kurtosis_before: float
    kurtosis_after: float | None


@dataclass(frozen=True)
class AttentionRow:
    """Where one attention block looks, as shares from 0 to 1; None where a model hides it, as when fused."""

    layer: str
    first_before: float | None
    first_after: float | None
    zeros_before: float | None
    zeros_after: float | None


@dataclass(frozen=True)
class ReportData:
    """All that a report says.

    Attributes:
        title: the model's name.
        pipeline: its text form; `target`: name of the target.
        verdict, verdict_words: how far the result was checked.
        warnings: what a reader should know first.
        outputs: deviation of each output of the result, as deployed, from the original.
        metric: the user's metric (before, after), or None.
        size: bytes of all constants (before, after).
        nodes: node counts (before, after).
        precisions: by precision: (precision, bytes before, bytes after, layers before, layers after).
        kernels: (kernel, count) of the low-bit layers, most frequent first.
        passes, operators: in order.
        layers: in the order of the original model.
        drift: in the order of the original model; `drift_facts` says what it was measured over, None where it
            was not.
        distributions: of the layers that lose most.
        outliers: layers of largest activations, the largest first.
        attention: blocks in the order of the original model.
        graph: nodes, edges and drawings for the viewer; see `neighbourhood`.
        environment, digests: (name, value).
        missing: what the report lacks, and why.
    """

    title: str
    pipeline: str
    target: str
    verdict: Verdict
    verdict_words: str
    warnings: tuple[str, ...]
    outputs: tuple[OutputRow, ...]
    metric: tuple[float, float] | None
    size: tuple[int, int]
    nodes: tuple[int, int]
    precisions: tuple[tuple[Precision, int, int, int, int], ...]
    kernels: tuple[tuple[str, int], ...]
    passes: tuple[PassRow, ...]
    layers: tuple[LayerRow, ...]
    drift: tuple[DriftPoint, ...]
    drift_facts: DriftFacts | None
    distributions: tuple[Distribution, ...]
    outliers: tuple[OutlierRow, ...]
    attention: tuple[AttentionRow, ...]
    operators: tuple[OperatorRow, ...]
    graph: Mapping[str, Any]
    environment: tuple[tuple[str, str], ...]
    digests: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]
