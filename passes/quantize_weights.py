# SPDX-License-Identifier: Apache-2.0
"""Weight-only quantization in blocks: 2, 3, 4 or 8 bits, activations in float."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from splitfold.passes.affine import BlockQuantized, quantize_blocks
from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.candidates import candidate_layers
from splitfold.passes.carriers import Carried, carry_blocks, carry_blocks_qdq
from splitfold.passes.layers import Layer, LayerKind
from splitfold.passes.opset import raise_opset
from splitfold.passes.values import drop_unused, replace_value
from splitfold.runtime.target import Carrier

__all__ = ["BlockForm", "QuantizeWeightsPass"]


class BlockForm(enum.Enum):
    """How block-wise weights are written."""

    NBITS = "nbits"
    """com.microsoft::MatMulNBits, which names its kernel's accuracy level."""
    QDQ = "qdq"
    """Standard DequantizeLinear with block_size (opset 21), which the runtime fuses to MatMulNBits."""


_QDQ_BITS = (4, 8)


@dataclass(frozen=True)
class QuantizeWeightsPass(LayerPass):
    """Hold the weights of MatMul and Gemm in blocks of few bits, rounded to nearest.

    Needs no calibration. Blocks run along K; any K is allowed, the last block is padded. 3 bits are stored in
    4: they save nothing over 4 but compress better.

    Args:
        bits: 2, 3, 4 or 8.
        block: rows of a column that share a scale: 16, 32, 64, 128 or 256.
        symmetric: fix the zero point at the middle: fewer bytes, more error.
        form: how it is written.
        accuracy_level: of MatMulNBits: 4 computes in int8 (fast), 1 in float32 (the runtime's default 0 is 13
            to 20 times slower for 2 and 8 bits).

    Before::

        y = MatMul(x, W)

    After::

        y = com.microsoft::MatMulNBits<bits=4, block_size=32, accuracy_level=4>(x, W_int4, W_scales,
        W_zero_points)
    """

    name: ClassVar[str] = "quantize-weights"
    contract: ClassVar[Contract] = Contract.LOSSY
    takes: ClassVar[str] = "MatMul and Gemm with a constant weight"
    bits: int = 4
    block: int = 32
    symmetric: bool = False
    form: BlockForm = BlockForm.NBITS
    accuracy_level: int = 4

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"bits is {self.bits}; it may be 2, 3, 4 or 8.")
        if self.block not in (16, 32, 64, 128, 256):
            raise ValueError(f"block is {self.block}; it may be 16, 32, 64, 128 or 256.")
        if self.accuracy_level not in (0, 1, 2, 3, 4):
            raise ValueError(f"accuracy-level is {self.accuracy_level}; it may be 0 to 4.")
        if self.form is BlockForm.QDQ and self._stored_bits not in _QDQ_BITS:
            raise ValueError(
                f"form=qdq holds 3, 4 and 8 bits, not {self.bits}: opset 21 has no such type. Use form=nbits."
            )

    @property
    def _stored_bits(self) -> int:
        return 4 if self.bits == 3 else self.bits

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""

        def reason_against(layer: Layer) -> str | None:
            return self._structural_reason(layer, context)

        layers = candidate_layers(self, model, findings, reason_against)
        opset_raised = False
        if layers and self.form is BlockForm.QDQ:
            if reason := raise_opset(model, 21):
                findings.skipped.extend((layer.name, reason) for layer in layers)
                return False
            layers = candidate_layers(self, model, Findings(), reason_against)  # the converter made new nodes
            opset_raised = True
        stored = elements = 0
        for layer in (layer.current() for layer in layers):
            quantized = self._quantize(layer)
            carried = self._carry(layer, quantized)
            replace_value(layer.output, carried.output)
            drop_unused([layer.node])
            findings.apply(
                layer.name, f"{layer.kind.value} weights in {self.bits} bits", weight=carried.weight
            )
            stored += _stored_bytes(quantized, self._stored_bits)
            elements += quantized.codes.shape[0] * quantized.columns
        if elements:
            findings.notes.append(self._bits_note(stored, elements))
        return bool(layers) or opset_raised

    def _bits_note(self, stored: int, elements: int) -> str:
        note = (
            f"{8 * stored / elements:.2f} bits a weight as stored, scales, zero points and padding included"
        )
        return note + "; 3-bit codes are stored in 4 bits" if self.bits == 3 else note

    def _structural_reason(self, layer: Layer, context: Context) -> str | None:
        carrier = Carrier.MATMUL_NBITS if self.form is BlockForm.NBITS else Carrier.BLOCKED_DEQUANTIZE
        if not context.target.carries(carrier):
            return f"target {context.target.name} does not carry {carrier.value}"
        if layer.kind is LayerKind.CONV:
            return "a Conv has no block-wise carrier"
        if layer.weight.dtype is not ir.DataType.FLOAT:
            return f"the weight is {layer.weight.dtype}, not FLOAT"
        rows = layer.weight_array().shape[0]
        if self.form is BlockForm.QDQ and rows % self.block:
            return f"K = {rows} is no multiple of block = {self.block}: form=nbits pads it, form=qdq cannot"
        return None

    def _quantize(self, layer: Layer) -> BlockQuantized:
        matrix = np.ascontiguousarray(layer.weight_array().T)
        return quantize_blocks(
            matrix, bits=self._stored_bits, block=self.block, symmetric=self.symmetric, levels=2**self.bits
        )

    def _carry(self, layer: Layer, quantized: BlockQuantized) -> Carried:
        if self.form is BlockForm.QDQ:
            return carry_blocks_qdq(layer, quantized, block=self.block)
        return carry_blocks(layer, quantized, block=self.block, accuracy_level=self.accuracy_level)


def _stored_bytes(quantized: BlockQuantized, bits: int) -> int:
    zeros = (
        0
        if quantized.zero_points is None
        else -(-quantized.zero_points.shape[1] * bits // 8) * quantized.zero_points.shape[0]
    )
    return quantized.codes.size * bits // 8 + quantized.scales.nbytes + zeros
