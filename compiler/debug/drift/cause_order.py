# SPDX-License-Identifier: Apache-2.0
"""Causes: a node reads other values than the reference's does, or the same in another order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

__all__ = ["order_note"]


def order_note(reference: ir.Node | None, part: Sequence[ir.Node], names: Mapping[str, str]) -> str:
    """Return words on how the one node of `part` reads the matched values differently, or an empty text.

    Args:
        reference: the node of the reference.
        part: nodes of the compiled model that compute its value.
        names: the reference's name of each matched value that the part reads.
    """
    if reference is None or len(part) != 1 or part[0].op_type != reference.op_type:
        return ""
    known = set(names.values())
    here = [value.name for value in reference.inputs if value is not None]
    there = [names.get(value.name or "", value.name) for value in part[0].inputs if value is not None]
    if here == there or not (known & {*here, *there}):
        return ""
    if sorted(map(str, here)) == sorted(map(str, there)):
        return f"it reads its inputs in another order: {_listed(there)}, the reference {_listed(here)}"
    changed = [(a, b) for a, b in zip(here, there, strict=False) if a != b and b in known]
    return f"it reads '{changed[0][1]}' where the reference reads '{changed[0][0]}'" if changed else ""


def _listed(names: Sequence[str | None]) -> str:
    return ", ".join(f"'{name}'" for name in names)
