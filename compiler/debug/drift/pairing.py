# SPDX-License-Identifier: Apache-2.0
"""Two models made comparable: which values of the one stand for which of the other."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from splitfold.compiler.debug.drift.slices import unreadable
from splitfold.compiler.errors import ComparisonError
from splitfold.compiler.source import read_graph
from splitfold.passes.base import Findings
from splitfold.passes.canonicalize import name_all
from splitfold.passes.identity import layers_of
from splitfold.passes.provenance import anchors, stands_for
from splitfold.passes.shapes import infer_shapes
from splitfold.runtime.artifact import Artifact
from splitfold.runtime.errors import did_you_mean
from splitfold.runtime.feeds import model_inputs

__all__ = ["Pairing", "pair_models"]


@dataclass(frozen=True)
class Pairing:
    """Two models and their common values.

    Attributes:
        reference, actual: copies of the models, calls inlined, values and layers named, types inferred.
        counterparts: for each value of the reference that the other model computes too, the names of those
            that stand for it there, in order; the last one is compared.
    """

    reference: ir.Model
    actual: ir.Model
    counterparts: Mapping[str, tuple[str, ...]]


def pair_models(reference: object, actual: object) -> Pairing:
    """Return the two models with their common values.

    Args:
        reference, actual: path of an ``.onnx`` file or artifact folder, `Artifact`, `onnx.ModelProto` or
            `onnx_ir.Model`; they are not changed.

    Raises:
        ArtifactError: a file cannot be read.
        CaptureError: one is nothing of the above.
        ComparisonError: the models have different inputs or outputs, or no value in common.
    """
    first, second = _prepared(reference), _prepared(actual)
    _check_signatures(first, second)
    found = _counterparts(first, second)
    if _strangers(first, second, found):
        raise ComparisonError(
            "the models have no layer in common: neither was made from the other by splitfold, and no values "
            "but the outputs have equal names. Compare a model with what was compiled from it, or quantize "
            "it with a tool that keeps the names of values."
        )
    return Pairing(first, second, found)


def _prepared(model: object) -> ir.Model:
    made = model.model.clone() if isinstance(model, Artifact) else read_graph(model)[0]
    name_all(made, Findings())
    infer_shapes(made)
    return made


def _strangers(reference: ir.Model, actual: ir.Model, found: Collection[str]) -> bool:
    """Return whether the models share nothing but their outputs, in name or provenance."""
    if {*found} - {value.name for value in reference.graph.outputs}:
        return False
    here, there = ({layer for n in model.graph for layer in layers_of(n)} for model in (reference, actual))
    return not found or (len(here) > 1 and here.isdisjoint(there))


def _counterparts(reference: ir.Model, actual: ir.Model) -> dict[str, tuple[str, ...]]:
    """Return the values of `actual` by the value of `reference` that they stand for; where several of the
    reference stand for one, the last counts."""
    values = {value.name: value for node in actual.graph for value in node.outputs if value.name}
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        if (original := stands_for(value)) is not None:
            groups.setdefault(original, []).append(name)
    sources = {value.name: value for node in reference.graph for value in node.outputs}
    last = {there: here for here, there in anchors(reference, actual).items()}
    found = {}
    for there, here in last.items():
        original = stands_for(values[there])
        names = tuple(groups[original]) if original is not None else (there,)
        if not unreadable(sources[here]) and not unreadable(values[there]):
            found[here] = names
    order = [value.name for node in reference.graph for value in node.outputs]
    return {name: found[name] for name in order if name in found}


def _check_signatures(reference: ir.Model, actual: ir.Model) -> None:
    inputs = ({v.name or "": v for v in model_inputs(model)} for model in (reference, actual))
    _check_values("input", *inputs, exact=True)
    outputs = ({v.name or "": v for v in model.graph.outputs} for model in (reference, actual))
    _check_values("output", *outputs, exact=False)


def _check_values(
    what: str, reference: Mapping[str, ir.Value], actual: Mapping[str, ir.Value], *, exact: bool
) -> None:
    for name in reference:
        if name not in actual:
            near = did_you_mean(name, actual)
            raise ComparisonError(
                f"the compiled model lacks the {what} '{name}' of the reference.{near} Its {what}s: "
                f"{', '.join(actual) or 'none'}."
            )
    for name, value in actual.items():
        if name not in reference:
            raise ComparisonError(
                f"the compiled model has the {what} '{name}', which the reference lacks. The reference's "
                f"{what}s: {', '.join(reference) or 'none'}."
            )
        first, second = reference[name].dtype, value.dtype
        if first is None or second is None or first == second:
            continue
        if exact or first.is_floating_point() != second.is_floating_point():
            raise ComparisonError(
                f"{what} '{name}' is {first.name} in the reference and {second.name} in the compiled model: "
                "they cannot be run on the same data and compared."
            )
