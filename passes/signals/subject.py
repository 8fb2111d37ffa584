# SPDX-License-Identifier: Apache-2.0
"""What a signal looks at: the float model, the layers in question, and the precisions that each can have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitfold.passes.base import Context
from splitfold.passes.carry_out import Carrying, Variant, make_variant
from splitfold.passes.layers import Layer
from splitfold.passes.pieces import Piece, cut_pieces
from splitfold.passes.precision import Precision
from splitfold.passes.values import constant

__all__ = ["Subject", "find_subject"]


@dataclass(frozen=True, eq=False)
class Subject:
    """The layers of a model that are to get a precision each.

    Attributes:
        model: float model in canonical form; it is not changed.
        pieces: the layers with a choice, cut out, in the order of execution.
        choices: by layer name, the precisions that it can have, in the order in which they were asked for.
        context: target and calibration data.
        variants: by precision other than float, the model with every layer in it that can have it.
        refused: (layer, reason) of each that has no choice.
        lacking: (layer, precision, reason) of each choice that a layer with others cannot have.
    """

    model: ir.Model
    pieces: tuple[Piece, ...]
    choices: Mapping[str, tuple[Precision, ...]]
    context: Context
    variants: Mapping[Precision, Variant]
    refused: tuple[tuple[str, str], ...] = ()
    lacking: tuple[tuple[str, Precision, str], ...] = ()

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers with a choice, in the order of execution."""
        return tuple(piece.layer for piece in self.pieces)


def find_subject(
    model: ir.Model,
    layers: Sequence[Layer],
    choices: Sequence[Precision],
    context: Context,
    carrying: Carrying,
) -> Subject:
    """Return the layers with the precisions that each of them can really have: every one is tried on a copy.

    Args:
        model: float model in canonical form.
        layers: of it.
        choices: precisions to choose from.
        context: target, and calibration data where a precision or its rounding needs them.
        carrying: how precisions are made.

    Raises:
        CalibrationError: calibration data is missing or does not fit.
    """
    counts = Counter(layer.name for layer in layers)
    refused = [(layer.name, reason) for layer in layers if (reason := _obstacle(layer, counts))]
    fit = [layer for layer in layers if not _obstacle(layer, counts)]
    names = [layer.name for layer in fit]
    asked = [precision for precision in choices if not precision.is_float] if fit else []
    variants = {precision: make_variant(model, precision, names, context, carrying) for precision in asked}
    pieces, uncut = cut_pieces(model, [layer for layer in fit if _low_bit(layer, variants)], variants)
    refused += [(layer.name, _reasons(layer, variants)) for layer in fit if not _low_bit(layer, variants)]
    found = {piece.layer.name: _open(piece.layer, choices, variants) for piece in pieces}
    lacking = tuple(
        (name, precision, variants[precision].reasons.get(name, "it was not applied"))
        for name, own in found.items()
        for precision in asked
        if precision not in own
    )
    return Subject(model, tuple(pieces), found, context, variants, (*refused, *uncut.items()), lacking)


def _obstacle(layer: Layer, counts: Mapping[str, int]) -> str | None:
    if layer.in_subgraph:
        return "it stands in a subgraph, whose activations cannot be measured"
    if constant(layer.input) is not None:
        return "its input is constant"
    return "another layer has the same name" if counts[layer.name] > 1 else None


_Variants = Mapping[Precision, Variant]


def _low_bit(layer: Layer, variants: _Variants) -> bool:
    return any(layer.name in variant.applied for variant in variants.values())


def _open(layer: Layer, choices: Sequence[Precision], variants: _Variants) -> tuple[Precision, ...]:
    return tuple(item for item in choices if item.is_float or layer.name in variants[item].applied)


def _reasons(layer: Layer, variants: _Variants) -> str:
    reasons = {
        str(item): variant.reasons.get(layer.name, "not applied") for item, variant in variants.items()
    }
    if len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    return "; ".join(f"{item}: {reason}" for item, reason in reasons.items()) or "no low-bit choice was given"
