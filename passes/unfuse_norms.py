# SPDX-License-Identifier: Apache-2.0
"""Keep the runtime from fusing a residual Add with the norm after it, where its fused kernel is slower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.identity import display_layer
from splitfold.passes.values import constant
from splitfold.runtime.target import Fusion

__all__ = ["UnfuseNormsPass"]


@dataclass(frozen=True)
class UnfuseNormsPass(LayerPass):
    """Write the residual Add before a LayerNormalization as Sum. Exact, bit for bit.

    ONNX Runtime's CPU provider fuses Add and LayerNormalization to SkipLayerNormalization, whose kernel takes
    longer than the two it replaces. A Sum of two values computes the same and is not matched.

    Before::

        y = LayerNormalization(Add(a, b), gamma, beta)

    After::

        y = LayerNormalization(Sum(a, b), gamma, beta)
    """

    name: ClassVar[str] = "unfuse-norms"
    contract: ClassVar[Contract] = Contract.EXACT
    takes: ClassVar[str] = "LayerNormalization right after an Add"

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        pairs = [(norm, add) for graph in model.graphs() for norm in graph if (add := _residual(norm))]
        self.check_patterns(display_layer(norm) for norm, _ in pairs)
        before = len(findings.applied)
        for norm, add in pairs:
            layer = display_layer(norm)
            reason = self.unwanted(layer) or _unfusable(add, context)
            if reason is not None:
                findings.skip(layer, reason)
                continue
            add.op_type = "Sum"
            findings.apply(layer, "residual Add written as Sum")
        return len(findings.applied) > before


def _residual(norm: ir.Node) -> ir.Node | None:
    if norm.op_type != "LayerNormalization" or norm.domain != "" or not norm.inputs or norm.inputs[0] is None:
        return None
    add = norm.inputs[0].producer()
    return add if add is not None and add.op_type == "Add" and add.domain == "" else None


def _unfusable(add: ir.Node, context: Context) -> str | None:
    """Return why the Add stays: the runtime would not fuse it, or its target has no such fusion."""
    if Fusion.SKIP_NORM not in context.target.slow_fusions:
        return f"target {context.target.name} makes no such fusion, or makes it fast"
    if any(constant(value) is not None for value in add.inputs):
        return "it adds a constant: a bias, not a residual"
    if add.outputs[0].dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return "it does not add floats"
    return None
