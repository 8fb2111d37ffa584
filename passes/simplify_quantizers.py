# SPDX-License-Identifier: Apache-2.0
"""Fewer QuantizeLinear and DequantizeLinear: what lies between integer layers stays in integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.identity import display_layer
from splitfold.passes.quantized_constants import fold_quantized
from splitfold.passes.quantizer_moves import hoist, is_mover, sink
from splitfold.passes.quantizer_pairs import cancel, measure_codes, merge_twins
from splitfold.passes.quantizers import DEQUANTIZE, QUANTIZE

__all__ = ["SimplifyQuantizersPass"]

_DYNAMIC = "DynamicQuantizeLinear"
_READERS = ("Shape", "Size")


@dataclass(frozen=True)
class SimplifyQuantizersPass(LayerPass):
    """Remove and move Q/DQ, without changing a bit.

    What quantizers write around every operator, this undoes: Q(DQ(x)) on one grid is x; a Q or DQ that a
    value has twice is one; Reshape, Flatten, Transpose, Squeeze, Unsqueeze, Slice, Gather, Split and Concat
    move codes where they stand between Q and DQ of one grid, or alone read what is dequantized; a Q of a
    constant, and a mover of constant codes, are constants, as is a small constant that a norm reads;
    a Shape is that of the codes.

    Before::

        y = QuantizeLinear(Transpose(DequantizeLinear(x, s, z)), s, z)

    After::

        y = Transpose(x)
    """

    name: ClassVar[str] = "simplify-quantizers"
    contract: ClassVar[Contract] = Contract.EXACT
    takes: ClassVar[str] = "QuantizeLinear and DequantizeLinear with constant scales, and what lies between"

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        self.check_patterns(display_layer(node) for node in model.graph.all_nodes() if _is_quantizer(node))
        left: dict[ir.Node, str] = {}
        while self._round(model, findings, left):
            pass
        for node, reason in left.items():
            findings.skip(display_layer(node), reason)
        return bool(findings.applied)

    def _round(self, model: ir.Model, findings: Findings, left: dict[ir.Node, str]) -> bool:
        """Try every rewrite once; return whether any found something."""
        before = len(findings.applied)
        for find in (fold_quantized, merge_twins):
            for layer, done in find(model, lambda node: self._wanted(node, left)):
                findings.apply(layer, done)
        steps: tuple[tuple[Callable[[ir.Node], bool], Callable[[ir.Node], str]], ...] = (
            (lambda node: node.op_type in _READERS and node.domain == "", measure_codes),
            (lambda node: node.op_type == QUANTIZE, lambda node: cancel(node, findings)),
            (is_mover, sink),
            (is_mover, hoist),
        )
        for fits, rewrite in steps:
            for node in _live(model, fits):
                layer = display_layer(node)
                if self._wanted(node, left) and (done := rewrite(node)):
                    findings.apply(layer, done)
        return len(findings.applied) > before

    def _wanted(self, node: ir.Node, left: dict[ir.Node, str]) -> bool:
        reason = self.unwanted(display_layer(node))
        if reason is not None and _is_quantizer(node):
            left[node] = reason
        return reason is None


def _is_quantizer(node: ir.Node) -> bool:
    return node.op_type in (QUANTIZE, DEQUANTIZE, _DYNAMIC)


def _live(model: ir.Model, fits: Callable[[ir.Node], bool]) -> Iterator[ir.Node]:
    """Yield the nodes that fit and are still there when it is their turn."""
    for node in [node for node in model.graph.all_nodes() if fits(node)]:
        if node.graph is not None:
            yield node
