# SPDX-License-Identifier: Apache-2.0
"""What became of each layer and why, from an artifact alone: its graph, and the records in its manifest."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from splitfold.compiler.debug.drift.measurement import Drift
from splitfold.compiler.debug.explain.layer_steps import (
    Action,
    PassStep,
    float_reason,
    layer_steps,
    put_back,
    recorded,
)
from splitfold.compiler.debug.explain.near_patterns import PatternFit, pattern_fits
from splitfold.compiler.debug.explain.reasons import Reason, node_reason
from splitfold.compiler.debug.explain.storage import Storage, stored_weights
from splitfold.compiler.inspection import constant_bytes
from splitfold.passes.errors import SpecError
from splitfold.passes.identity import display_layer, layers_of, name_layers
from splitfold.passes.provenance import VALUES_KEY
from splitfold.runtime.artifact import Artifact
from splitfold.runtime.errors import did_you_mean

__all__ = ["Explanation", "LayerExplanation", "OperatorNote", "Totals", "explain"]


@dataclass(frozen=True)
class OperatorNote:
    """Nodes of a layer that hold no low-bit weight, for one reason.

    Attributes:
        operator: operator type.
        nodes: their names.
        reason: why.
    """

    operator: str
    nodes: tuple[str, ...]
    reason: Reason


@dataclass(frozen=True)
class LayerExplanation:
    """One layer, or several that were fused.

    Attributes:
        layers: user-facing names.
        operators: how often each operator stands in it.
        precision: what it computes with: ``int8, activations static``, ``float``, ``8-bit`` (between
            integer layers), ``indices``.
        kernel: operator of the runtime that reads its low-bit weight, as recorded; empty without one.
        weights: how its weights are stored.
        steps: what each pass did to it, in order.
        local_db: SQNR in dB of its own output in the form that it has, where a pass measured it.
        reason: why it is in float; empty where it is not.
        notes: why each of its other nodes holds no low-bit weight.
        patterns: known patterns of several operators that its nodes fit, or nearly fit.
    """

    layers: tuple[str, ...]
    operators: dict[str, int]
    precision: str
    kernel: str
    weights: tuple[Storage, ...]
    steps: tuple[PassStep, ...]
    local_db: float | None
    reason: str
    notes: tuple[OperatorNote, ...]
    patterns: tuple[PatternFit, ...] = ()

    @property
    def name(self) -> str:
        """All names in one."""
        return "+".join(self.layers)

    @property
    def low_bit(self) -> bool:
        """Whether all its weights are held in integers; false without weights."""
        return bool(self.weights) and all(weight.low_bit for weight in self.weights)

    @property
    def bits(self) -> float | None:
        """Stored bits a weight, scales, zero points and padding included; None without weights."""
        elements = sum(weight.elements for weight in self.weights if weight.counted)
        return sum(weight.bits * weight.elements for weight in self.weights) / elements if elements else None


@dataclass(frozen=True)
class Totals:
    """All weights of the model, each counted once; bytes, but for `elements`."""

    elements: int
    codes: int
    scales: int
    zero_points: int
    padding: int
    bias: int
    other: int


@dataclass(frozen=True)
class Explanation:
    """A whole model.

    Attributes:
        layers: in the model's order.
        totals: of all weights.
        pipeline: what ran.
        model_steps: what passes did to the model as a whole.
    """

    layers: tuple[LayerExplanation, ...]
    totals: Totals
    pipeline: str
    model_steps: tuple[PassStep, ...]

    def find(self, pattern: str) -> list[LayerExplanation]:
        """Return the layers that `pattern` names: a layer, shell wildcards, or the name of a node.

        Raises:
            SpecError: it names none.
        """
        if found := [layer for layer in self.layers if _names(layer, pattern)]:
            return found
        if found := [layer for layer in self.layers if any(pattern in note.nodes for note in layer.notes)]:
            return found
        known = sorted({name for layer in self.layers for name in layer.layers})
        raise SpecError(
            f"no layer matches '{pattern}'.{did_you_mean(pattern, known)} A layer whose nodes were all "
            "removed (an identity, a constant) is in no artifact; without LAYER all are listed."
        )


def _names(layer: LayerExplanation, pattern: str) -> bool:
    rule = re.compile(fnmatch.translate(pattern))
    candidates = (*layer.layers, layer.name, *(weight.node.name or "" for weight in layer.weights))
    return any(name == pattern or rule.match(name) is not None for name in candidates)


def explain(artifact: Artifact, *, drift: Drift | None = None) -> Explanation:
    """Return what became of each layer of `artifact`, and why.

    Args:
        artifact: with the records of its passes; its model is given layer names where it has none.
        drift: from the original to the artifact: the local error where no pass measured it.
    """
    model, manifest = artifact.model, artifact.manifest
    name_layers(model)
    stored = {weight.node: weight for weight in stored_weights(model)}
    fits = pattern_fits(model, artifact.target)
    local = _drifted(drift)
    layers = tuple(
        _layer(names, nodes, _Context(stored, manifest, fits, local))
        for names, nodes in _groups(model)
        if any(node.op_type != "Constant" for node in nodes)
    )
    whole = layer_steps(("model",), manifest, mentioned_only=True)
    return Explanation(layers, _totals(model, stored.values()), str(manifest.get("pipeline", "")), whole)


@dataclass(frozen=True)
class _Context:
    """What is known of the whole model."""

    stored: Mapping[ir.Node, Storage]
    manifest: Mapping[str, Any]
    fits: Sequence[PatternFit]
    local: Mapping[str, float]


def _drifted(drift: Drift | None) -> dict[str, float]:
    points = {} if drift is None else drift.by_layer()
    return {layer: point.local.sqnr_db for layer, point in points.items() if point.local is not None}


def _groups(model: ir.Model) -> Iterator[tuple[tuple[str, ...], list[ir.Node]]]:
    """Yield the nodes by layer, in order; layers that a node names together are one group."""
    nodes = [node for graph in model.graphs() for node in graph]
    parents: dict[str, str] = {}

    def root(name: str) -> str:
        while (parent := parents.setdefault(name, name)) != name:
            name = parent
        return name

    names = {node: layers_of(node) or (display_layer(node),) for node in nodes}
    for found in names.values():
        for name in found[1:]:
            parents[root(name)] = root(found[0])
    groups: dict[str, list[ir.Node]] = {}
    for node in nodes:
        groups.setdefault(root(names[node][0]), []).append(node)
    for members in groups.values():
        yield tuple(dict.fromkeys(name for node in members for name in names[node])), members


def _layer(names: tuple[str, ...], nodes: Sequence[ir.Node], context: _Context) -> LayerExplanation:
    manifest = context.manifest
    weights = tuple(context.stored[node] for node in nodes if node in context.stored)
    steps = layer_steps(names, manifest)
    low_bit = bool(weights) and all(weight.low_bit for weight in weights)
    notes = _notes(nodes, context.stored, low_bit)
    local = _local(steps)
    fits = [fit for fit in context.fits if not set(nodes).isdisjoint((*fit.nodes, fit.end))]
    return LayerExplanation(
        layers=names,
        operators=dict(Counter(node.op_type for node in nodes)),
        precision=_precision(weights, notes),
        kernel=recorded(names, manifest.get("realised", {}), {}).get("kernel", ""),
        weights=weights,
        steps=steps,
        local_db=recorded(names, context.local, None) if local is None and weights else local,
        reason="" if low_bit else _reason(names, weights, notes, steps, manifest),
        notes=notes,
        patterns=tuple(fits),
    )


def _notes(
    nodes: Iterable[ir.Node], stored: Mapping[ir.Node, Storage], low_bit: bool
) -> tuple[OperatorNote, ...]:
    found: dict[tuple[str, Reason], list[str]] = {}
    for node in nodes:
        if node in stored and stored[node].low_bit:
            continue
        reason = node_reason(node)
        if low_bit and reason.telling and VALUES_KEY in node.metadata_props:
            reason = Reason("a pass put it in: it serves the low-bit form of the layer", telling=False)
        found.setdefault((node.op_type, reason), []).append(node.name or "")
    return tuple(OperatorNote(operator, tuple(names), reason) for (operator, reason), names in found.items())


def _precision(weights: Sequence[Storage], notes: Sequence[OperatorNote]) -> str:
    if weights:
        return "; ".join(dict.fromkeys(weight.precision for weight in weights))
    reasons = [note.reason.why for note in notes]
    if all("no floats" in reason for reason in reasons):
        return "indices"
    return "8-bit" if any("in integers" in reason for reason in reasons) else "float"


def _local(steps: Sequence[PassStep]) -> float | None:
    """Return what was measured of the form that the layer has: by the last pass that was applied to it."""
    taken = [step for step in steps if step.action is Action.APPLIED and step.lossy]
    return taken[-1].measured_db if taken else None


def _reason(
    names: tuple[str, ...],
    weights: Sequence[Storage],
    notes: Sequence[OperatorNote],
    steps: Sequence[PassStep],
    manifest: Mapping[str, Any],
) -> str:
    """Return why the layer is in float, in one sentence."""
    if kernel := put_back(names, manifest):
        return f"put back to float: in low precision no low-bit kernel computed it, it ran as {kernel}"
    own = {weight.node.name or "" for weight in weights}
    of_weights = [note.reason.why for note in notes if own & set(note.nodes)]
    skipped = any(step.lossy and step.action is Action.SKIPPED for step in steps)
    if weights and all(of_weights) and not skipped:
        return of_weights[0]
    if weights or not all(note.reason.why for note in notes):
        return float_reason(steps, manifest)
    return _without_weights(notes)


def _without_weights(notes: Sequence[OperatorNote]) -> str:
    telling = [note for note in notes if note.reason.telling] or notes
    operators: dict[str, list[str]] = {}
    for note in telling:
        operators.setdefault(note.reason.why, []).append(note.operator)
    return "; ".join(f"{', '.join(dict.fromkeys(names))}: {why}" for why, names in operators.items())


def _totals(model: ir.Model, stored: Iterable[Storage]) -> Totals:
    seen: dict[str, Storage] = {}
    for weight in stored:
        seen.setdefault(weight.weight, weight)
    kept = list(seen.values())
    codes, bias = sum(weight.codes for weight in kept), sum(weight.bias for weight in kept)
    scales, zeros = sum(weight.scales for weight in kept), sum(weight.zero_points for weight in kept)
    return Totals(
        elements=sum(weight.elements for weight in kept if weight.counted),
        codes=codes,
        scales=scales,
        zero_points=zeros,
        padding=sum(weight.padding for weight in kept),
        bias=bias,
        other=max(constant_bytes(model) - codes - scales - zeros - bias, 0),
    )
