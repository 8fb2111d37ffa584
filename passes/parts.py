# SPDX-License-Identifier: Apache-2.0
"""Parts of a layer: a layer that a pass wrote as several operators keeps its name, and each part has an
address.

``encoder.dense:outliers`` is the part of the layer ``encoder.dense`` that holds its outliers. Addresses stand
in layer patterns only; records, and every tool that compares models, go by the layer.
"""

from __future__ import annotations

import enum

import onnx_ir as ir

__all__ = ["PART_KEY", "Part", "address", "mark_part", "names_a_part", "part_of_node"]

PART_KEY = "splitfold.part"


class Part(enum.Enum):
    """Which part of a layer an operator computes."""

    REST = "rest"
    """What is left of the layer without its outliers."""
    OUTLIERS = "outliers"
    """The few channels that stand apart."""


def mark_part(node: ir.Node, part: Part) -> None:
    """Record in the metadata of `node` which part of its layer it computes."""
    node.metadata_props[PART_KEY] = part.value


def part_of_node(node: ir.Node) -> Part | None:
    """Return which part of its layer `node` computes, or None where it is the whole."""
    text = node.metadata_props.get(PART_KEY)
    return next((part for part in Part if part.value == text), None)


def address(layer: str, part: Part | None) -> str:
    """Return how a pattern names this part of `layer`: ``layer:part``, or the layer itself."""
    return layer if part is None else f"{layer}:{part.value}"


def names_a_part(pattern: str) -> str | None:
    """Return the layer pattern of ``layer:part``, or None for a pattern that names no part."""
    layer, colon, part = pattern.rpartition(":")
    return layer if colon and part in {item.value for item in Part} else None
