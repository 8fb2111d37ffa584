# SPDX-License-Identifier: Apache-2.0
"""Weight quantization in blocks: 2, 3, 4 or 8 bits, activations in float, or in int8 with dual-grained
weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from splitfold.passes.activations import activation_stats, required_calibration
from splitfold.passes.affine import ActivationGrid, BlockQuantized, activation_grid
from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.block_grid import BlockLayout
from splitfold.passes.branches import covers_again
from splitfold.passes.candidates import candidate_layers
from splitfold.passes.carriers import Carried, carry_blocks, carry_blocks_qdq
from splitfold.passes.dgq import DualGrained
from splitfold.passes.dual_int8 import DualInt8
from splitfold.passes.gptq import Compensation, Ranges
from splitfold.passes.layers import Layer, LayerKind
from splitfold.passes.opset import default_opset, raise_opset
from splitfold.passes.values import constant, drop_unused, replace_value
from splitfold.passes.weight_forms import BlockForm, Expand, paper_bytes, stored_bytes
from splitfold.passes.weight_methods import Rounded, Rounding, WeightMethod, round_from_data, round_weights

__all__ = ["BlockForm", "Expand", "QuantizeWeightsPass", "Ranges", "WeightMethod"]

_QDQ_BITS = (4, 8)
_DUAL_BITS = (2, 3, 4)
_DAMPING = 0.01
_ACCURACY_LEVEL = 4
_OPSET_OF_4_BITS = 21
_INT8_LEVELS = 127


@dataclass(frozen=True)
class QuantizeWeightsPass(LayerPass):
    """Hold the weights of MatMul and Gemm in blocks of few bits.

    Rounding to nearest (rtn) and the search by weight error (mse) need no calibration; awq, gptq and dgq look
    at the layers' inputs. Blocks run along K; any K is allowed, the last block is padded. 3 bits are stored
    in 4: they save nothing over 4 but compress better.

    Args:
        method: how weights are rounded. rtn: to nearest; mse: in the range of least weight error; awq: in the
            range of least output error; gptq: column by column with compensation of errors; dgq: integer
            scales inside a channel, which an int8 product can take.
        bits: 2, 3, 4 or 8 (dgq: up to 4).
        block: rows of a column that share a scale: 16, 32, 64, 128 or 256.
        symmetric: fix the zero point at the middle: fewer bytes, more error. Not of dgq.
        act_order: of gptq: round the columns that matter most first.
        damping: of gptq: part of the mean diagonal of X^T X that is added to its diagonal.
        ranges: of gptq: searched (by what an error costs) or whole (as published).
        form: how it is written. The int8 forms are of dgq.
        expand: of the int8 forms: when 4-bit codes become int8.
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
    method: WeightMethod = WeightMethod.RTN
    bits: int = 4
    block: int = 32
    symmetric: bool = False
    act_order: bool = False
    damping: float = _DAMPING
    ranges: Ranges = Ranges.SEARCHED
    form: BlockForm = BlockForm.NBITS
    expand: Expand = Expand.LOAD
    accuracy_level: int = _ACCURACY_LEVEL

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"bits is {self.bits}; it may be 2, 3, 4 or 8.")
        if self.block not in (16, 32, 64, 128, 256):
            raise ValueError(f"block is {self.block}; it may be 16, 32, 64, 128 or 256.")
        if self.accuracy_level not in (0, 1, 2, 3, 4):
            raise ValueError(f"accuracy-level is {self.accuracy_level}; it may be 0 to 4.")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping is {self.damping}; it lies above 0 and is at most 1.")
        if self.form is BlockForm.QDQ and self._stored_bits not in _QDQ_BITS:
            raise ValueError(
                f"form=qdq holds 3, 4 and 8 bits, not {self.bits}: opset 21 has no such type. Use form=nbits."
            )
        self._check_method()
        self._check_form()

    def _check_method(self) -> None:
        dual = self.method is WeightMethod.DGQ
        changed = {
            "act-order": self.act_order,
            "damping": self.damping != _DAMPING,
            "ranges": self.ranges is not Ranges.SEARCHED,
        }
        for option, given in changed.items():
            if given and self.method is not WeightMethod.GPTQ:
                raise ValueError(f"{option} is an option of method=gptq, not of method={self.method.value}.")
        if dual and self.symmetric:
            raise ValueError("symmetric is no option of method=dgq: its blocks have zero points.")
        if dual and self.bits not in _DUAL_BITS:
            raise ValueError(f"bits is {self.bits}; with method=dgq it may be 2, 3 or 4.")

    def _check_form(self) -> None:
        form = self.form.value
        if self.form.is_int8 and self.method is not WeightMethod.DGQ:
            raise ValueError(
                f"form={form} needs method=dgq, not {self.method.value}: other weights have float scales "
                "inside a channel. quantize-activations and quantize-dynamic make int8 weights."
            )
        if self.form.is_int8 and self.accuracy_level != _ACCURACY_LEVEL:
            raise ValueError(f"accuracy-level is an option of form=nbits, not of form={form}.")
        if not self.form.is_int8 and self.expand is not Expand.LOAD:
            raise ValueError(f"expand is an option of the int8 forms, not of form={form}.")

    @property
    def _stored_bits(self) -> int:
        return 4 if self.bits == 3 else self.bits

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        before = default_opset(model)
        layers, expand = self._layers(model, context, findings)
        grids: dict[ir.Node, ActivationGrid] = {}
        if layers and self.form is BlockForm.INT8_STATIC:
            layers, grids = self._static_grids(model, layers, context, findings)
        if layers:
            rounded = self._round(model, layers, context)
            self._replace(layers, rounded, DualInt8(self.form, expand, grids, default_opset(model)), findings)
        return bool(layers) or default_opset(model) != before

    def _layers(self, model: ir.Model, context: Context, findings: Findings) -> tuple[list[Layer], Expand]:
        """Return the layers to quantize, in a model of an opset that can hold them, and when to expand."""

        def reason_against(layer: Layer) -> str | None:
            return self._structural_reason(layer, context)

        layers = candidate_layers(self, model, findings, reason_against)
        qdq, expanded = self.form is BlockForm.QDQ, self.form.is_int8 and self.expand is Expand.LOAD
        if not layers or not (qdq or expanded):
            return layers, self.expand
        if reason := raise_opset(model, _OPSET_OF_4_BITS):
            if expanded:
                findings.notes.append(f"codes are stored in int8, not in 4 bits: {reason}")
                return layers, Expand.OFFLINE
            findings.skipped.extend((layer.name, reason) for layer in layers)
            return [], self.expand
        # the converter made new nodes
        return candidate_layers(self, model, Findings(), reason_against), self.expand

    def _structural_reason(self, layer: Layer, context: Context) -> str | None:
        if not context.target.carries(self.form.carrier):
            return f"target {context.target.name} does not carry {self.form.carrier.value}"
        if layer.kind is LayerKind.CONV:
            return "a Conv has no block-wise carrier"
        if layer.weight.dtype is not ir.DataType.FLOAT:
            return f"the weight is {layer.weight.dtype}, not FLOAT"
        if self.form is BlockForm.INT8_STATIC and layer.in_subgraph:
            return "it stands in a subgraph, whose activations cannot be calibrated"
        if self.form is BlockForm.INT8_STATIC and constant(layer.input) is not None:
            return "its input is constant"
        rows = layer.weight_array().shape[0]
        if self.form is BlockForm.QDQ and rows % self.block:
            return f"K = {rows} is no multiple of block = {self.block}: form=nbits pads it, form=qdq cannot"
        return None

    def _static_grids(
        self, model: ir.Model, layers: Sequence[Layer], context: Context, findings: Findings
    ) -> tuple[list[Layer], dict[ir.Node, ActivationGrid]]:
        """Return the layers whose input an 8-bit grid can hold, and the grids by the layers' nodes."""
        calibration = required_calibration(context.calibration, f"{self.name}{{form=int8-static}}", model)
        names = [layer.input.name or "" for layer in layers]
        stats = activation_stats(model, names, calibration, context.target)
        grids = {}
        for layer in layers:
            seen = stats[layer.input.name or ""]
            if reason := seen.unholdable():
                findings.skip(layer.name, f"'{layer.input.name}': {reason}")
            else:
                grids[layer.node] = activation_grid(seen.low, seen.high)
        return [layer for layer in layers if layer.node in grids], grids

    def _round(self, model: ir.Model, layers: Sequence[Layer], context: Context) -> dict[ir.Value, Rounded]:
        layout = BlockLayout(self._stored_bits, self.block, self.symmetric, 2**self.bits)
        compensation = Compensation(self.damping, self.act_order, self.ranges)
        levels = context.target.weight_levels if self.form.is_int8 else _INT8_LEVELS
        rounding = Rounding(self.method, layout, compensation, levels)
        if not self.method.needs_data:
            return round_weights(layers, rounding)
        wanted = f"{self.name}{{method={self.method.value}}}"
        calibration = required_calibration(context.calibration, wanted, model)
        return round_from_data(model, layers, rounding, calibration, context.target)

    def _replace(
        self, layers: Sequence[Layer], rounded: Mapping[ir.Value, Rounded], int8: DualInt8, findings: Findings
    ) -> None:
        """Put the low-bit form of each layer in its place."""
        sizes: dict[str, _Size] = {}
        first = {layer.name for layer in layers if not covers_again(layer.node)}
        for layer in (layer.current() for layer in layers):
            found = rounded[layer.weight]
            weight = found.weight()
            counted = layer.name not in first or not covers_again(layer.node)
            carried, replaced = self._carry(layer, weight, int8)
            replace_value(replaced[0].outputs[0], carried.output)
            drop_unused(replaced)
            form = f", {self.form.value}" if self.form.is_int8 else ""
            done = f"{layer.kind.value} weights in {self.bits} bits{found.how}{form}"
            findings.apply(layer.name, done, weight=carried.weight)
            sizes[carried.weight] = _size(weight, self.form, int8.expand, counted=counted)
        int8.finish()
        findings.notes.append(self._bits_note(list(sizes.values())))

    def _carry(
        self, layer: Layer, weight: BlockQuantized | DualGrained, int8: DualInt8
    ) -> tuple[Carried, list[ir.Node]]:
        """Return the low-bit form and the nodes whose place it takes, the last computed first."""
        if isinstance(weight, DualGrained) and self.form.is_int8:
            return int8.carry(layer, weight)
        blocks = weight.block_wise() if isinstance(weight, DualGrained) else weight
        if self.form is BlockForm.QDQ:
            return carry_blocks_qdq(layer, blocks, block=self.block), [layer.node]
        carried = carry_blocks(layer, blocks, block=self.block, accuracy_level=self.accuracy_level)
        return carried, [layer.node]

    def _bits_note(self, sizes: Sequence[_Size]) -> str:
        weights = max(1, sum(size.weights for size in sizes))
        bits = 8 * sum(size.stored for size in sizes) / weights
        note = f"{bits:.2f} bits a weight as stored, scales, zero points and padding included"
        if self.method is WeightMethod.DGQ:
            note += f"; {8 * sum(size.paper for size in sizes) / weights:.2f} as DGQ counts"
        return note + "; 3-bit codes are stored in 4 bits" if self.bits == 3 else note


@dataclass(frozen=True)
class _Size:
    """Of one weight: how many weights it has (none where another part of the layer counts them), the bytes
    stored, and the bytes as DGQ counts them."""

    weights: int
    stored: int
    paper: float


def _size(weight: BlockQuantized | DualGrained, form: BlockForm, expand: Expand, *, counted: bool) -> _Size:
    paper = paper_bytes(weight) if isinstance(weight, DualGrained) else 0.0
    held = weight.block_wise() if isinstance(weight, DualGrained) and not form.is_int8 else weight
    stored = stored_bytes(held, expanded=expand is Expand.OFFLINE)
    return _Size(weight.codes.shape[0] * weight.columns if counted else 0, stored, paper)
