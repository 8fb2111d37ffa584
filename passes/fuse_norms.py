# SPDX-License-Identifier: Apache-2.0
"""Root mean square norms written out, as ONNX's operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.identity import display_layer
from splitfold.passes.later_operators import make_available
from splitfold.passes.norm_forms import RootMeanSquare, follow, mean_squares
from splitfold.passes.symbolic_shapes import SymbolicShapes, symbolic_shapes
from splitfold.passes.values import drop_computed, emit, replace_value

__all__ = ["FuseNormsPass"]

_OPERATOR, _OPSET = "RMSNormalization", 23
"""The operator is there from this version on."""


@dataclass(frozen=True)
class FuseNormsPass(LayerPass):
    """Write a root mean square norm as one RMSNormalization of ONNX opset 23. Exact but for rounding.

    Before::

        y = x * Reciprocal(Sqrt(ReduceMean(x^2) + epsilon)) * weight

    After::

        y = RMSNormalization(x, weight, axis=-1, epsilon=epsilon)
    """

    name: ClassVar[str] = "fuse-norms"
    contract: ClassVar[Contract] = Contract.EXACT
    takes: ClassVar[str] = "the mean of squares, of which a norm is computed"

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        found = self._found(model)
        self.check_patterns(_layer(norm) for norm, _ in found)
        reason = None
        if any(obstacle is None for _, obstacle in found):
            reason = make_available(model, _OPERATOR, _OPSET, context.target) or None
            found = self._found(model)  # of the raised model
        made: dict[ir.Value, ir.Value] = {}
        changed = False
        for norm, obstacle in found:
            layer = _layer(norm)
            if obstacle or reason:
                findings.skip(layer, obstacle or reason or "")
                continue
            _fuse(norm, made)
            findings.apply(layer, "norm as one operator")
            changed = True
        return changed

    def _found(self, model: ir.Model) -> list[tuple[RootMeanSquare, str | None]]:
        """Return each norm, with the reason why it stays where there is one."""
        norms = [it for graph in model.graphs() for it in mean_squares(graph)]
        shapes = symbolic_shapes(model) if norms else SymbolicShapes()
        return [(norm, self.unwanted(_layer(norm)) or follow(norm, shapes)) for norm in norms]


def _layer(norm: RootMeanSquare) -> str:
    return display_layer(norm.nodes[1])


def _fuse(norm: RootMeanSquare, made: dict[ir.Value, ir.Value]) -> None:
    """Put the operator in the place of the norm; `made` is what took the place of values before."""
    if norm.weight is None:
        raise ValueError(f"{_layer(norm)} has no weight")
    last = norm.nodes[-1].outputs[0]
    fused = emit(
        norm.nodes[-1],
        _OPERATOR,
        [made.get(norm.x, norm.x), made.get(norm.weight, norm.weight)],
        origins=norm.nodes,
        attributes={"axis": -1, "epsilon": norm.epsilon},
        names=[f"{last.name}_rms"],
        like=last,
    )
    made[last] = fused
    replace_value(last, fused)
    drop_computed(last)
