# SPDX-License-Identifier: Apache-2.0
"""Which value of the original graph a value stands for, through every rewrite: two models are compared by it.

A node that a pass made says so in its metadata under `splitfold.values` (a JSON list, one entry an output):
the name of the original value that the output took the place of, or an empty text where it is something new,
such as codes or a scaled input. The outputs of any other node stand for their own names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import onnx_ir as ir

__all__ = ["VALUES_KEY", "anchors", "mark_new", "stand_for", "stand_in", "stands_for"]

VALUES_KEY = "splitfold.values"


def stands_for(value: ir.Value) -> str | None:
    """Return the name of the original value that `value` equals but for rounding, or None where it is
    something new."""
    node = value.producer()
    text = node.metadata_props.get(VALUES_KEY) if node is not None else None
    if node is None or text is None:
        return value.name
    names = json.loads(text)
    position = next(i for i, output in enumerate(node.outputs) if output is value)
    return names[position] or None if position < len(names) else None


def stand_in(new: ir.Value, old: ir.Value) -> None:
    """Record that `new` takes the place of `old`: it stands for what `old` stood for."""
    _record(new, stands_for(old))


def stand_for(value: ir.Value, name: str) -> None:
    """Record that `value` stands for what is called `name`: a part of an original value, say."""
    _record(value, name)


def mark_new(value: ir.Value) -> None:
    """Record that `value` stands for no original value: its node is new, or computes something else now."""
    _record(value, None)


def _record(value: ir.Value, name: str | None) -> None:
    node = value.producer()
    if node is None:
        return
    names = [stands_for(output) or "" for output in node.outputs]
    names[next(i for i, output in enumerate(node.outputs) if output is value)] = name or ""
    node.metadata_props[VALUES_KEY] = json.dumps(names)


def anchors(reference: ir.Model, actual: ir.Model) -> dict[str, str]:
    """Return, for each value computed in the main graph of `reference` that has a counterpart in `actual`,
    the names of both, in the order of `reference`.

    Values are matched by what they stand for; new ones (standing for nothing) by equal names, which two
    stages of one compilation share. Of several counterparts the last counts: a value and its round trip
    through a grid, say. Shapes are not compared.
    """
    found = dict(_keys(actual))
    return {name: found[key] for key, name in _keys(reference) if key in found}


def _keys(model: ir.Model) -> Iterator[tuple[tuple[bool, str], str]]:
    """Yield ((is original, key), name) of each value that a node of the main graph computes."""
    for node in model.graph:
        for value in node.outputs:
            if value.name:
                original = stands_for(value)
                yield ((True, original) if original is not None else (False, value.name)), value.name
