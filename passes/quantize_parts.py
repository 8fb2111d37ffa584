# SPDX-License-Identifier: Apache-2.0
"""The parts of split weights in few bits, each on its own grid, and added up again: one layer, one weight."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.effective_bits import entropy
from splitfold.passes.emit_parts import weight_position
from splitfold.passes.layers import find_layers
from splitfold.passes.opset import default_opset, raise_opset
from splitfold.passes.part_carriers import carry_codes, carry_float
from splitfold.passes.part_codes import Grain, Grouping, PartCodes, PartGrid, code_parts
from splitfold.passes.split_weight import matrix_of
from splitfold.passes.summed_weights import SummedLayer, summed_layers
from splitfold.passes.values import drop_unused

__all__ = ["Grain", "PartForm", "PartGrid", "QuantizePartsPass"]

_OPSET_OF_4_BITS = 21


class PartForm(enum.Enum):
    """How the rounded weight is written."""

    FLOAT = "float"
    """As one float weight: its accuracy, not its size; a quantizer may follow."""
    CODES = "codes"
    """As codes in the file, which the runtime decodes to a float weight when it opens the model."""


@dataclass(frozen=True)
class QuantizePartsPass(LayerPass):
    """Round the parts that `split-layers{form=weight}` made, each to its own grid, and add them up to one
    weight.

    The layer computes as before, in float, at the cost of one layer. A weight is in one part, so a code that
    says which part and which level holds it.

    Args:
        bits: of a part's levels: 2, 3, 4 or 8.
        per: which weights of a part share a grid: tensor, channel or block.
        block: of per=block: weights of an output channel that share a grid.
        symmetric: of grid=zero: fix the zero point at the middle.
        grid: zero: a part's grid holds zero, as it must in parallel layers; own: it covers the part's weights
            alone, whose levels then all serve.
        form: float or codes.

    Before::

        y = MatMul(x, Sum(W_1, W_2, W_3))

    After::

        y = MatMul(x, W_rounded)       # or MatMul(x, GatherElements((levels - zeros) * scales, W_codes))
    """

    name: ClassVar[str] = "quantize-parts"
    contract: ClassVar[Contract] = Contract.LOSSY
    takes: ClassVar[str] = "layers whose weight is a sum of parts, as split-layers{form=weight} leaves them"
    bits: int = 4
    per: Grain = Grain.BLOCK
    block: int = 128
    symmetric: bool = False
    grid: PartGrid = PartGrid.ZERO
    form: PartForm = PartForm.FLOAT

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"bits is {self.bits}; it may be 2, 3, 4 or 8.")
        if self.block not in (16, 32, 64, 128, 256):
            raise ValueError(f"block is {self.block}; it may be 16, 32, 64, 128 or 256.")
        if self.symmetric and self.grid is PartGrid.OWN:
            raise ValueError("symmetric is no option of grid=own, which need not hold zero.")

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        before = default_opset(model)
        found = self._candidates(model, findings)
        if found and self.form is PartForm.CODES:
            if reason := raise_opset(model, _OPSET_OF_4_BITS):
                for item in found:
                    findings.skip(item.layer.name, f"codes of 4 bits need opset {_OPSET_OF_4_BITS}: {reason}")
                return False
            found = self._candidates(model, Findings())  # the converter made new nodes
        held = [self._replace(item, findings) for item in found]
        if held:
            findings.notes.append(self._note(held))
        return bool(held) or default_opset(model) != before

    def _candidates(self, model: ir.Model, findings: Findings) -> list[SummedLayer]:
        found = summed_layers(model)
        others = [layer.name for layer in find_layers(model)[0]]
        self.check_patterns([*(item.layer.name for item in found), *others])
        kept = []
        for item in found:
            reason = self.unwanted(item.layer.name) or self._reason_against(item)
            if reason is None:
                kept.append(item)
            else:
                findings.skip(item.layer.name, reason)
        return kept

    def _reason_against(self, item: SummedLayer) -> str | None:
        array = item.layer.weight_array()
        if array.dtype != np.float32:
            return f"the weight is {array.dtype}, not float32"
        return None if np.isfinite(array).all() else "the weight holds NaN or infinity"

    def _replace(self, item: SummedLayer, findings: Findings) -> PartCodes:
        layer = item.layer
        matrix, index = (matrix_of(layer, array) for array in (layer.weight_array(), item.index))
        codes = code_parts(
            matrix,
            index,
            Grouping(self.per, self.block),
            bits=self.bits,
            symmetric=self.symmetric,
            grid=self.grid,
        )
        carry = carry_codes if self.form is PartForm.CODES else carry_float
        layer.node.replace_input_with(weight_position(layer), carry(layer, codes))
        drop_unused([item.total])
        findings.apply(layer.name, f"{layer.kind.value} weight of {codes.parts} parts in {self.bits} bits")
        return codes

    def _note(self, held: list[PartCodes]) -> str:
        weights = sum(codes.shape[0] * codes.shape[1] for codes in held)
        stored = 8 * sum(codes.stored_bytes() for codes in held) / weights
        apart = 8 * sum(_apart_bytes(codes, self.bits, self.symmetric) for codes in held) / weights
        bits = sum(entropy(codes.own_codes()) * codes.shape[0] * codes.shape[1] for codes in held) / weights
        most = max(codes.parts for codes in held) * 2**self.bits
        where = "as stored" if self.form is PartForm.CODES else "its codes would take, of 32 stored"
        return (
            f"{stored:.2f} bits a weight {where}, scales, zero points and padding included ({apart:.2f} as "
            f"one layer a part); at most {most} levels a group, entropy of the codes {bits:.2f} bits"
        )


def _apart_bytes(codes: PartCodes, bits: int, symmetric: bool) -> float:
    """Return the bytes of as many layers of `bits`, 3 of them in 4, with float32 scales and packed zero
    points."""
    width = 4 if bits == 3 else bits
    zeros = 0 if symmetric else width / 8
    return codes.parts * codes.codes.size * width / 8 + codes.scales.size * (4 + zeros)
