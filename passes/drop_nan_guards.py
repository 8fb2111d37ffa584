# SPDX-License-Identifier: Apache-2.0
"""Remove the guard against NaN behind a softmax whose scores are finite."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.identity import display_layer
from splitfold.passes.magnitudes import Interval, Unbounded, interval
from splitfold.passes.values import drop_unused, replace_value

__all__ = ["DropNanGuardsPass"]


@dataclass(frozen=True)
class DropNanGuardsPass(LayerPass):
    """Remove ``Where(IsNaN(p), c, p)`` behind a Softmax that cannot give NaN. Exact, bit for bit.

    A softmax is NaN where a row holds NaN or +infinity, or -infinity only: a query that sees no key. PyTorch
    guards its attention against that. Where the mask is a finite number, as exporters write it, such a row is
    uniform instead and the guard never acts; it costs more than the softmax (Where runs on one thread).

    Before::

        p = Softmax(scores + mask); q = Where(IsNaN(p), 0, p)

    After::

        q = Softmax(scores + mask)
    """

    name: ClassVar[str] = "drop-nan-guards"
    contract: ClassVar[Contract] = Contract.EXACT
    takes: ClassVar[str] = "a Where that puts a constant in the place of NaN behind a Softmax"

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        guards = [found for graph in model.graphs() for found in _guards(graph)]
        self.check_patterns(display_layer(softmax) for softmax, *_ in guards)
        known: dict[ir.Value, Interval | Unbounded] = {}
        before = len(findings.applied)
        for softmax, is_nan, where in guards:
            layer = display_layer(softmax)
            reason = self.unwanted(layer) or _obstacle(interval(softmax.inputs[0], known))
            if reason is not None:
                findings.skip(layer, reason)
                continue
            replace_value(where.outputs[0], softmax.outputs[0])
            drop_unused([where, is_nan])
            findings.apply(layer, "guard against NaN removed: its scores are finite")
        return len(findings.applied) > before


def _guards(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node, ir.Node]]:
    """Yield (Softmax, IsNaN, Where) of each guard."""
    for where in graph:
        if where.op_type != "Where" or where.domain != "" or len(where.inputs) != 3:
            continue
        condition, guarded = where.inputs[0], where.inputs[2]
        is_nan = condition.producer() if condition is not None else None
        softmax = guarded.producer() if guarded is not None else None
        if is_nan is None or softmax is None or (is_nan.op_type, softmax.op_type) != ("IsNaN", "Softmax"):
            continue
        if is_nan.inputs[0] is guarded and not softmax.outputs[0].is_graph_output():
            yield softmax, is_nan, where


def _obstacle(scores: Interval | Unbounded) -> str | None:
    if isinstance(scores, Unbounded):
        return scores.reason
    return None if scores.finite else "a whole row of its scores may be -infinity: a mask of infinities"
