# SPDX-License-Identifier: Apache-2.0
"""What can be seen of the cause of a local error, in a few words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from splitfold.compiler.debug.drift.cause_fit import fit_note
from splitfold.compiler.debug.drift.cause_grid import grid_note, grids, step_note
from splitfold.compiler.debug.drift.cause_order import order_note
from splitfold.compiler.debug.drift.cut import Cut
from splitfold.compiler.debug.drift.impact import Exhibit
from splitfold.compiler.debug.drift.sums import Sums
from splitfold.passes.values import int_attribute

__all__ = ["Causes"]

_CODES = {"MatMulNBits", "GatherBlockQuantized"}


class Causes:
    """Explains suspects; knows the models, and which values inside a compiled part are worth a look.

    Args:
        reference: the reference.
        cut: the compiled model, cut open.
        parts: for each source of error, by the reference's value, the nodes of the cut model that compute it.
    """

    def __init__(self, reference: ir.Model, cut: Cut, parts: Mapping[str, Sequence[ir.Node]]) -> None:
        self._made = {value.name: node for node in reference.graph for value in node.outputs}
        self._cut = cut
        self._parts = parts
        self._grids = {name: grids(part) for name, part in parts.items()}

    def cases(self, suspects: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Return the sources to try together: those that read a value through one grid have one cause.

        Each suspect is in one case at least; a case has the name of what is rounded, or of its only source.
        """
        readers: dict[str, list[str]] = {}
        for name, found in self._grids.items():
            for value in dict.fromkeys(grid.value for grid in found):
                readers.setdefault(value, []).append(name)
        made: dict[str, tuple[str, ...]] = {}
        for name in suspects:
            shared = [grid.value for grid in self._grids[name] if len(readers[grid.value]) > 1]
            made |= {value: tuple(readers[value]) for value in shared} or {name: (name,)}
        return made

    def inside(self, name: str) -> list[str]:
        """Return the names of the values inside the part of a source that its explanation needs."""
        given = {value.name for value in self._cut.model.graph.inputs}
        return [grid.value for grid in self._grids[name] if grid.value not in given]

    def explain(self, exhibit: Exhibit) -> str:
        """Return what can be seen of the cause, or an empty text."""
        sums = Sums()
        sums.add(exhibit.expected, exhibit.given)
        if sums.broken:
            return sums.broken
        part = self._parts[exhibit.name]
        notes = (
            _non_finite(exhibit),
            order_note(self._made.get(exhibit.name), part, self._cut.inputs),
            grid_note(
                self._grids[exhibit.name], exhibit.inside, self._label, sums.distance.deviation().relative
            ),
            step_note(part, [exhibit.expected, *exhibit.inside.values()]),
            fit_note(exhibit.expected, exhibit.given),
            _weights(part),
        )
        return next((note for note in notes if note), "")

    def _label(self, name: str) -> str:
        return self._cut.inputs.get(name, name)


def _non_finite(exhibit: Exhibit) -> str:
    if exhibit.given.dtype.kind != "f" or exhibit.expected.dtype.kind != "f":
        return ""
    count = int((np.isfinite(exhibit.expected) & ~np.isfinite(exhibit.given)).sum())
    return f"{count} of its {exhibit.given.size} elements are NaN or infinite" if count else ""


def _weights(part: Sequence[ir.Node]) -> str:
    """Return how its weights are held, where that is in low precision."""
    for node in part:
        if node.op_type in _CODES:
            bits, block = int_attribute(node, "bits", 4), int_attribute(node, "block_size", 128)
            return f"its weights are held in {bits} bits, blocks of {block}"
    held = {
        value.const_value.dtype.name.lower()
        for node in part
        for value in node.inputs
        if value is not None and value.const_value is not None and len(value.shape or ()) > 1
    }
    low = sorted(held & {"int8", "uint8", "int4", "uint4", "int2", "uint2"})
    return f"its weights are held in {low[0]}" if low else ""
