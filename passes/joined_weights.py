# SPDX-License-Identifier: Apache-2.0
"""Weights that were joined into one: which initializer holds what passes before knew by another name."""

from __future__ import annotations

import json
from collections.abc import Iterable

import onnx_ir as ir

__all__ = ["joined_weights", "mark_joined"]

_KEY = "splitfold.holds"


def mark_joined(value: ir.Value, held: Iterable[ir.Value]) -> None:
    """Record that the initializer `value` holds what the initializers `held` did."""
    names = [name for each in held for name in (each.name or "", *_names(each))]
    value.metadata_props[_KEY] = json.dumps(names)


def _names(value: ir.Value) -> list[str]:
    return list(json.loads(value.metadata_props.get(_KEY, "[]")))


def joined_weights(model: ir.Model) -> dict[str, str]:
    """Return, by the name of each weight that is gone into another, the name of that one."""
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    return {name: value.name or "" for value in values for name in _names(value)}
