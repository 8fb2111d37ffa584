# SPDX-License-Identifier: Apache-2.0
"""Layer splitting: a layer as the sum of layers of narrower ranges, or its weight as that of such parts."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from splitfold.passes.activations import required_calibration
from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.branches import BranchKind, branch_of_node
from splitfold.passes.emit_parts import replace_by_branches, replace_weight_by_sum
from splitfold.passes.layers import Layer, LayerKind, find_layers
from splitfold.passes.opset import default_opset
from splitfold.passes.split_choice import Limits, Offer, Quantizer, choose, offers
from splitfold.passes.split_weight import Partition, SplitBy, SplitScope, split_parts
from splitfold.runtime.feeds import Array

__all__ = ["Select", "SplitBy", "SplitForm", "SplitLayersPass", "SplitScope"]

_GEMM_WITHOUT_BIAS = 11
_CHOICE = ("bits", "block", "symmetric", "min_gain", "budget", "max_work")


class SplitForm(enum.Enum):
    """How a split layer is written."""

    BRANCHES = "branches"
    """As parallel layers whose outputs are added."""
    WEIGHT = "weight"
    """As one layer whose weight is the sum of its parts, for quantize-parts."""


class Select(enum.Enum):
    """Which layers are split."""

    ALL = "all"
    ERROR = "error"
    """Those that gain most for what splitting costs, measured with the quantizer that is to follow."""


@dataclass(frozen=True)
class SplitLayersPass(LayerPass):
    """Split a layer's weight into parts of narrower ranges, which low-bit grids fit better (SplitQuant, arXiv
    2501.12428).

    Every weight stands in one part, with zeros in its place in the others, so that the parts add up to the
    weight exactly. Run it after everything that changes weights, and before a quantizer.

    Args:
        parts: 2 to 16; fewer where a layer has fewer distinct values.
        by: kmeans (optimal), quantile and magnitude part weights by value; channel whole input channels.
        scope: cluster a layer's weights together, or those of each output channel alone.
        form: branches for any quantizer, weight for quantize-parts.
        split_bias: cluster the bias too, as the paper does; else it stays whole on the first branch.
        embeddings: split the tables that a Gather reads, too.
        select: all layers, or those that gain most for their cost.
        bits: of select=error: of the quantizer that is to follow.
        block: of select=error: weights that share a scale in it.
        symmetric: of select=error: whether its zero point is fixed.
        min_gain: of select=error: dB that a layer's own output must gain.
        budget: of select=error: stored bits a weight over all candidates; 0 is no limit.
        max_work: of select=error: multiply-adds over all candidates, times those before; 0 is no limit.

    Before::

        y = MatMul(x, W)

    After::

        y = Sum(MatMul(x, W_1), MatMul(x, W_2), MatMul(x, W_3))      # or MatMul(x, Sum(W_1, W_2, W_3))
    """

    name: ClassVar[str] = "split-layers"
    contract: ClassVar[Contract] = Contract.EXACT
    takes: ClassVar[str] = "MatMul, Gemm, Conv and tables of a Gather with a constant weight"
    parts: int = 3
    by: SplitBy = SplitBy.KMEANS
    scope: SplitScope = SplitScope.TENSOR
    form: SplitForm = SplitForm.BRANCHES
    split_bias: bool = False
    embeddings: bool = False
    select: Select = Select.ALL
    bits: int = 2
    block: int = 128
    symmetric: bool = False
    min_gain: float = 3.0
    budget: float = 0.0
    max_work: float = 0.0

    def __post_init__(self) -> None:
        if not 2 <= self.parts <= 16:
            raise ValueError(f"parts is {self.parts}; it may be 2 to 16.")
        if self.by is SplitBy.CHANNEL and self.scope is SplitScope.CHANNEL:
            raise ValueError("scope=channel clusters weights inside a channel: by=channel takes whole ones.")
        if self.form is SplitForm.WEIGHT and self.split_bias:
            raise ValueError("split-bias is an option of form=branches: one layer has one bias.")
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"bits is {self.bits}; it may be 2, 3, 4 or 8.")
        if self.block not in (16, 32, 64, 128, 256):
            raise ValueError(f"block is {self.block}; it may be 16, 32, 64, 128 or 256.")
        for name, least in (("budget", 0), ("max_work", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name.replace('_', '-')} is {getattr(self, name)}; 0 is no limit.")
        fields = type(self).__dataclass_fields__
        for name in _CHOICE if self.select is Select.ALL else ():
            if getattr(self, name) != fields[name].default:
                raise ValueError(f"{name.replace('_', '-')} is an option of select=error.")

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        indices = dict(self._indices(self._candidates(model, findings), findings))
        taken: Mapping[str, Offer | None] = dict.fromkeys(layer.name for layer in indices)
        if self.select is Select.ERROR and indices:
            taken = self._chosen(model, indices, context, findings)
        kept = [layer for layer in indices if layer.name in taken]
        for layer in kept:
            parts = split_parts(layer.weight_array(), indices[layer])
            now = layer.current()
            if self.form is SplitForm.BRANCHES:
                replace_by_branches(now, parts, split_bias=self.split_bias)
            else:
                replace_weight_by_sum(now, parts)
            offer = taken[layer.name]
            told = "" if offer is None else f": {offer}"
            findings.apply(layer.name, f"{layer.kind.value} in {len(parts)} parts by {self.by.value}{told}")
        return bool(kept)

    def _candidates(self, model: ir.Model, findings: Findings) -> list[Layer]:
        layers, refused = find_layers(model)
        self.check_patterns([*(layer.name for layer in layers), *(name for name, _ in refused)])
        findings.skipped.extend(refused)
        kept = []
        for layer in layers:
            reason = self.unwanted(*layer.addresses) or self._reason_against(layer, model)
            if reason is None:
                kept.append(layer)
            else:
                findings.skip(layer.name, reason)
        return kept

    def _reason_against(self, layer: Layer, model: ir.Model) -> str | None:
        if any(mark.kind is BranchKind.PART for mark in branch_of_node(layer.node)):
            return "it is a part of a split layer"
        if layer.kind is LayerKind.EMBEDDING and not self.embeddings:
            return "a table stays whole without embeddings=true"
        bias_needed = layer.kind is LayerKind.GEMM and default_opset(model) < _GEMM_WITHOUT_BIAS
        if bias_needed and self.form is SplitForm.BRANCHES:
            return f"opset {default_opset(model)} has no Gemm without a bias (11 has)"
        array = layer.weight_array()
        if not array.size:
            return "its weight is empty"
        return None if np.isfinite(array).all() else "the weight holds NaN or infinity"

    def _indices(self, layers: Sequence[Layer], findings: Findings) -> Iterator[tuple[Layer, Array]]:
        """Yield the part of each weight, by layer, of those that have two parts or more."""
        partition = Partition(self.parts, self.by, self.scope)
        found: dict[ir.Value, Array] = {}
        for layer in layers:
            if layer.weight not in found:
                found[layer.weight] = partition.index(layer)
            if found[layer.weight].max() > 0:
                yield layer, found[layer.weight]
            else:
                what = (
                    "input channels are equally large" if self.by is SplitBy.CHANNEL else "weights are equal"
                )
                what = "magnitudes are equal" if self.by is SplitBy.MAGNITUDE else what
                findings.skip(layer.name, f"nothing to split: all its {what}")

    def _chosen(
        self, model: ir.Model, indices: Mapping[Layer, Array], context: Context, findings: Findings
    ) -> Mapping[str, Offer]:
        calibration = required_calibration(context.calibration, f"{self.name}{{select=error}}", model)
        quantizer = Quantizer(self.bits, self.block, self.symmetric, self.form is SplitForm.WEIGHT)
        found = {item.layer: item for item in offers(model, indices, quantizer, calibration, context.target)}
        for layer in indices:
            if layer.name not in found:
                findings.skip(layer.name, "its output cannot be measured: it stands in a subgraph")
        chosen, reasons = choose(list(found.values()), Limits(self.min_gain, self.budget, self.max_work))
        findings.skipped.extend(reasons.items())
        for name, offer in found.items():
            findings.measured[name] = offer.split_db if name in chosen else offer.plain_db
        findings.notes.append(_told(list(found.values()), chosen))
        return {name: found[name] for name in found if name in chosen}


def _told(found: Sequence[Offer], chosen: set[str]) -> str:
    weights, work = (max(1, sum(getattr(it, name) for it in found)) for name in ("weights", "work"))
    plain = sum(offer.plain_bytes for offer in found)
    extra = sum(offer.split_bytes - offer.plain_bytes for offer in found if offer.layer in chosen)
    more = sum(offer.extra_work for offer in found if offer.layer in chosen)
    return (
        f"{len(chosen)} of {len(found)} layers split: {8 * (plain + extra) / weights:.2f} stored bits a "
        f"weight with the quantizer that is to follow, {8 * plain / weights:.2f} unsplit; "
        f"{1 + more / work:.2f} times the multiply-adds"
    )
