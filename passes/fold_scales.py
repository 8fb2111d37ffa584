# SPDX-License-Identifier: Apache-2.0
"""Scale folding: x W = (x / s) (s W), with s chosen so that input or weight are easier to quantize."""

from __future__ import annotations

import enum
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from splitfold.passes.activations import channel_extremes, channel_rows, required_calibration
from splitfold.passes.awq import BlockFormat, search_awq
from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.channel_clip import ChannelClip, clipped_ends
from splitfold.passes.fold import fold_group
from splitfold.passes.foldable import ScaleGroup, scale_groups
from splitfold.passes.identity import inherit_missing
from splitfold.passes.layers import Layer
from splitfold.passes.repq import apply_repq, forget_range, reparameterise, repq_obstacle
from splitfold.passes.scale_trial import try_scales
from splitfold.passes.smoothquant import clipping_scales, smoothing_scales
from splitfold.runtime.feeds import Array

__all__ = ["FoldScalesPass", "ScaleMethod"]

logger = logging.getLogger(__name__)

_FOLDED = "splitfold.folded"
"""Metadata key of a layer's node: the methods whose scales it carries."""
_BATCHES = 8
"""Batches that the AWQ search holds."""

Extremes = Mapping[str, tuple[Array, Array]]


class ScaleMethod(enum.Enum):
    """How the scales are chosen."""

    SMOOTHQUANT = "smoothquant"
    """Magnitudes of activations and weights evened out (Xiao et al., 2023)."""
    AWQ = "awq"
    """Searched so that the block's output suffers least from low-bit weights (Lin et al., 2024)."""
    DGQ = "dgq"
    """Only the loudest channels are brought down to a percentile (Zhang et al., 2023)."""
    REPQ = "repq"
    """A grid for each channel, reparameterised to one for the tensor (Li et al., 2023)."""


_OPTIONS = {
    ScaleMethod.SMOOTHQUANT: ("alpha", "min_gain", "data_free"),
    ScaleMethod.AWQ: ("mul_gain", "bits", "block", "symmetric"),
    ScaleMethod.DGQ: ("share",),
    ScaleMethod.REPQ: ("bits", "clip"),
}


@dataclass(frozen=True)
class FoldScalesPass(LayerPass):
    """Scale the input channels of linear layers, and their weights inversely, so that quantization loses
    less. Exact.

    What makes the input absorbs the scale in its own constants: a norm, an embedding table, or another layer,
    through operators that a scale passes (ReLU, the product of a gated branch, reshaping, the weighted sum of
    attention with the heads of a group tied). Where nothing can, and `explicit` is set, one Mul of the input
    is emitted. Layers that must share their scales are a group.

    Args:
        method: how the scales are chosen.
        explicit: allow a Mul where nothing absorbs the scale.
        alpha: of smoothquant: how much of the difficulty moves from activations to weights, 0 to 1.
        min_gain: of smoothquant: gain in dB that a group's int8 output must show on calibration data.
        mul_gain: of awq: gain in dB that a block's output must show where the scale costs a Mul.
        data_free: of smoothquant: use no calibration data; only inputs that a LayerNormalization makes are
            scaled, their magnitudes estimated from gamma and beta.
        bits: of awq, bits of the weights (default 4); of repq, bits of the activations (default 8).
        block: of awq: rows of a column that share a scale.
        symmetric: of awq: whether the weights' zero point is fixed.
        share: of dgq: share of the channels that are brought down.
        clip: of repq: which part of a channel's range its grid covers; the rest will be clipped.

    Before::

        y = MatMul(x, W)

    After::

        y = MatMul(Mul(x, 1/s), s W)      # or LayerNormalization(h; gamma / s, beta / s)
    """

    name: ClassVar[str] = "fold-scales"
    contract: ClassVar[Contract] = Contract.EXACT
    takes: ClassVar[str] = "MatMul and Gemm of the main graph with a constant float32 weight"
    method: ScaleMethod = ScaleMethod.SMOOTHQUANT
    explicit: bool = True
    alpha: float = 0.65
    min_gain: float = 2.0
    mul_gain: float = 0.25
    data_free: bool = False
    bits: int = 0
    block: int = 32
    symmetric: bool = False
    share: float = 0.005
    clip: ChannelClip = ChannelClip.NONE

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; it lies between 0 and 1.")
        if not 0 < self.share < 1:
            raise ValueError(f"share is {self.share}; it lies between 0 and 1.")
        known = (2, 3, 4, 8) if self.method is ScaleMethod.AWQ else tuple(range(2, 9))
        if self.bits and self.bits not in known:
            raise ValueError(f"bits is {self.bits}; it may be {', '.join(map(str, known))}.")
        if self.block not in (16, 32, 64, 128, 256):
            raise ValueError(f"block is {self.block}; it may be 16, 32, 64, 128 or 256.")
        self._check_options()

    def _check_options(self) -> None:
        fields = type(self).__dataclass_fields__
        for name in {name for names in _OPTIONS.values() for name in names} - set(_OPTIONS[self.method]):
            if getattr(self, name) != fields[name].default:
                raise ValueError(f"{name.replace('_', '-')} is no option of method={self.method.value}.")

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        groups = self._groups(model, findings)
        if not groups:
            return False
        if self.method is ScaleMethod.REPQ:
            return self._repq(model, groups, context, findings)
        chosen = self._chosen(model, groups, context, findings)
        for group, scales in chosen.items():
            fold_group(model, group, scales)
            _mark(group, self.method)
            findings.apply(group.name, _carried(group))
            if group.region is None:
                findings.miss(group.name, "scales folded into what makes its input", group.obstacle)
        inherit_missing(model)
        return bool(chosen)

    def _groups(self, model: ir.Model, findings: Findings) -> list[ScaleGroup]:
        groups = [group for group in scale_groups(model) if group.is_linear]
        self.check_patterns(layer.name for group in groups for layer in group.layers)
        kept = []
        for group in groups:
            reasons = [reason for layer in group.layers if (reason := self.unwanted(layer.name))]
            reason = reasons[0] if reasons else self._against(group)
            if reason is None:
                kept.append(group)
            else:
                findings.skip(group.name, reason)
        return kept

    def _against(self, group: ScaleGroup) -> str | None:
        if any(self.method.value in _methods(layer.node) for layer in group.layers):
            return "its scales are folded already"
        if self.method is ScaleMethod.REPQ:
            return repq_obstacle(group)
        if group.region is None and not self.explicit:
            return f"nothing absorbs a scale: {group.obstacle}"
        return None

    def _chosen(
        self, model: ir.Model, groups: Sequence[ScaleGroup], context: Context, findings: Findings
    ) -> dict[ScaleGroup, Array]:
        if self.data_free:
            return self._data_free(groups, findings)
        if self.method is ScaleMethod.AWQ:
            return self._awq(model, groups, context, findings)
        calibration = required_calibration(context.calibration, self.name, model)
        seen = channel_extremes(model, _inputs(groups), calibration, context.target)
        usable = [group for group in groups if _usable(group, seen, findings)]
        peaks = {group: group.pooled(_peaks(group, seen)) for group in usable}
        if self.method is ScaleMethod.DGQ:
            return self._dgq(peaks, findings)
        scales = {
            group: smoothing_scales(peak, group.weight_peaks(), self.alpha) for group, peak in peaks.items()
        }
        chosen = {}
        plain, scaled = try_scales(model, scales, seen, calibration, context.target)
        for group in scales:
            gain = min(scaled[layer.name] - plain[layer.name] for layer in group.layers)
            kept = scaled if gain >= self.min_gain else plain
            findings.measured |= {layer.name: kept[layer.name] for layer in group.layers}
            if gain >= self.min_gain:
                chosen[group] = scales[group]
            else:
                findings.skip(
                    group.name, f"scaling gains {gain:.1f} dB in int8, below min-gain={self.min_gain:g}"
                )
        return chosen

    def _data_free(self, groups: Sequence[ScaleGroup], findings: Findings) -> dict[ScaleGroup, Array]:
        chosen = {}
        for group in groups:
            peaks = group.norm_peaks()
            if peaks is None:
                findings.skip(
                    group.name,
                    "its input is made by no LayerNormalization, so its magnitudes are unknown without data",
                )
            else:
                chosen[group] = smoothing_scales(peaks, group.weight_peaks(), self.alpha)
        return chosen

    def _dgq(self, peaks: Mapping[ScaleGroup, Array], findings: Findings) -> dict[ScaleGroup, Array]:
        chosen = {}
        for group, peak in peaks.items():
            scales = clipping_scales(peak, self.share)
            if (scales > 1).any():
                chosen[group] = scales
            else:
                findings.skip(group.name, "no channel is louder than the percentile")
        return chosen

    def _awq(
        self, model: ir.Model, groups: Sequence[ScaleGroup], context: Context, findings: Findings
    ) -> dict[ScaleGroup, Array]:
        calibration = required_calibration(context.calibration, f"{self.name}{{method=awq}}", model)
        form = BlockFormat(self.bits or 4, self.block, self.symmetric)
        batches = itertools.islice(calibration, _BATCHES)

        def refuse(group: ScaleGroup, reason: str) -> None:
            findings.skip(group.name, reason)

        found = search_awq(model, groups, batches, form, context.target, refuse)
        chosen = {}
        for group, choice in found.items():
            least = 0.0 if group.region is not None else self.mul_gain
            if choice.ratio > 0 and choice.gain_db >= least:
                chosen[group] = choice.scales
            else:
                findings.skip(
                    group.name,
                    f"the best ratio {choice.ratio:g} gains {choice.gain_db:.1f} dB"
                    + ("" if group.region is not None else f", below mul-gain={self.mul_gain:g} for a Mul"),
                )
        return chosen

    def _repq(
        self, model: ir.Model, groups: Sequence[ScaleGroup], context: Context, findings: Findings
    ) -> bool:
        calibration = required_calibration(context.calibration, f"{self.name}{{method=repq}}", model)
        seen = channel_extremes(model, _inputs(groups), calibration, context.target)
        usable, bits = [group for group in groups if _usable(group, seen, findings)], self.bits or 8
        rows: Mapping[str, Array] = {}
        if usable and self.clip is not ChannelClip.NONE:
            rows = channel_rows(model, _inputs(usable), calibration, context.target)
        for group in usable:
            name = group.layers[0].input.name or ""
            ends = seen[name]
            if name in rows:
                weights = [layer.weight_array() for layer in group.readers]
                ends = clipped_ends(rows[name], ends, weights, bits, self.clip)
            what = "channel grids" if name not in rows else f"channel grids ({_clipped(ends, seen[name])})"
            apply_repq(model, group, reparameterise(*ends, bits))
            _mark(group, self.method)
            findings.apply(group.name, f"{what} of {bits} bits folded into the norm")
        return bool(usable)


def _carried(group: ScaleGroup) -> str:
    if group.region is None:
        return "scales by an explicit Mul"
    makers = dict.fromkeys(item.node.op_type for item in group.region.parameters if item.divides)
    names = ["the norm" if "Normalization" in maker else f"the {maker}" for maker in makers]
    return f"scales folded into {' and '.join(dict.fromkeys(names))}"


def _methods(node: ir.Node) -> list[str]:
    return (node.metadata_props.get(_FOLDED) or "").split(",")


def _clipped(ends: tuple[Array, Array], seen: tuple[Array, Array]) -> str:
    whole = np.maximum(seen[1], 0) - np.minimum(seen[0], 0)
    kept = (ends[1] - ends[0])[whole > 0] / whole[whole > 0]
    if not (kept < 1).any():
        return "clipping none is best"
    return f"clipped to {kept.mean():.1%} of their ranges in the mean"


def _mark(group: ScaleGroup, method: ScaleMethod) -> None:
    for layer in group.layers:
        if method is not ScaleMethod.REPQ:
            forget_range(layer.node)
        earlier = [name for name in _methods(layer.node) if name]
        layer.node.metadata_props[_FOLDED] = ",".join([*earlier, method.value])


def _inputs(groups: Sequence[ScaleGroup]) -> list[str]:
    return [layer.input.name or "" for group in groups for layer in group.layers]


def _peaks(group: ScaleGroup, seen: Extremes) -> dict[Layer, Array]:
    extremes = {layer: seen[layer.input.name or ""] for layer in group.layers}
    return {layer: np.maximum(-low, high) for layer, (low, high) in extremes.items()}


def _usable(group: ScaleGroup, seen: Extremes, findings: Findings) -> bool:
    for layer in group.layers:
        found = seen.get(layer.input.name or "")
        if found is None or not np.isfinite(found).all() or np.abs(found).max(initial=0.0) > 1e20:
            findings.skip(group.name, "calibration saw no finite range of its input")
            return False
    return True
