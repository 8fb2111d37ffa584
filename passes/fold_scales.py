# SPDX-License-Identifier: Apache-2.0
"""Scale folding: x W = (x / s) (s W). Dividing the channels that hold outliers makes the input easier to
quantize.

SmoothQuant (Xiao et al., 2023, equation 4): s_j = max|x_j|^alpha / max|W_j|^(1 - alpha), j running over the
input channels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from splitfold.passes.activations import channel_extremes, required_calibration
from splitfold.passes.affine import activation_grid
from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.foldable import ScaleGroup, scale_groups
from splitfold.passes.layers import find_layers
from splitfold.passes.static_int8 import trial_carrier
from splitfold.passes.trial import local_sqnr
from splitfold.passes.values import add_initializer, drop_initializer, emit, forget_names, rename
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.feeds import Array
from splitfold.runtime.target import Target

__all__ = ["FoldScalesPass", "smoothing_scales"]

logger = logging.getLogger(__name__)

_FLOOR = 1e-5

Extremes = Mapping[str, tuple[Array, Array]]


@dataclass(frozen=True)
class FoldScalesPass(LayerPass):
    """Scale the input channels of linear layers so that their largest magnitudes even out, and their weights
    inversely. Exact.

    A LayerNormalization whose output only these layers read absorbs the scale in its gamma and beta. Where
    others read it too (the residual of a post-norm transformer), an explicit Mul is emitted, which costs one
    elementwise operation. Layers that read one value share its scale.

    With calibration data each group is tried in int8 and scaled only where that gains at least `min_gain` dB;
    with `data_free` only inputs made by a LayerNormalization are scaled, their magnitudes estimated from
    gamma and beta.

    Args:
        alpha: how much of the difficulty moves from activations to weights, 0 to 1.
        min_gain: least gain in dB of a group's int8 output for which it is scaled; not used when data-free.
        data_free: use no calibration data.

    Before::

        y = MatMul(x, W)

    After::

        y = MatMul(Mul(x, 1/s), s W)      # or LayerNormalization(h; gamma / s, beta / s)
    """

    name: ClassVar[str] = "fold-scales"
    contract: ClassVar[Contract] = Contract.EXACT
    takes: ClassVar[str] = "MatMul and Gemm of the main graph with a constant float32 weight"
    alpha: float = 0.65
    min_gain: float = 2.0
    data_free: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; it lies between 0 and 1.")

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        groups = self._groups(model, findings)
        if not groups:
            return False
        chosen = (
            self._data_free(groups, findings)
            if self.data_free
            else self._searched(model, groups, context, findings)
        )
        for group in groups:
            if group.value in chosen:
                _apply(group, chosen[group.value])
                findings.apply(
                    group.name,
                    "scales folded into the norm" if group.absorbed else "scales by an explicit Mul",
                )
                if group.obstacle is not None:
                    findings.miss(group.name, "scales folded into the norm", group.obstacle)
        return bool(chosen)

    def _groups(self, model: ir.Model, findings: Findings) -> list[ScaleGroup]:
        groups = scale_groups(model)
        self.check_patterns(layer.name for group in groups for layer in group.layers)
        kept = []
        for group in groups:
            reasons = [reason for layer in group.layers if (reason := self.unwanted(layer.name))]
            reason = reasons[0] if reasons else _already(group)
            if reason is None:
                kept.append(group)
            else:
                findings.skip(group.name, reason)
        return kept

    def _data_free(self, groups: Sequence[ScaleGroup], findings: Findings) -> dict[ir.Value, Array]:
        chosen = {}
        for group in groups:
            peaks = group.norm_peaks()
            if peaks is None:
                findings.skip(
                    group.name,
                    "its input is made by no LayerNormalization, so its magnitudes are unknown without data",
                )
            else:
                chosen[group.value] = smoothing_scales(peaks, group.weight_peaks(), self.alpha)
        return chosen

    def _searched(
        self, model: ir.Model, groups: Sequence[ScaleGroup], context: Context, findings: Findings
    ) -> dict[ir.Value, Array]:
        calibration = required_calibration(context.calibration, self.name, model)
        seen = channel_extremes(
            model, [group.value.name or "" for group in groups], calibration, context.target
        )
        usable = [group for group in groups if _usable(group, seen, findings)]
        scales = {
            g.value: smoothing_scales(_peaks(seen[g.value.name or ""]), g.weight_peaks(), self.alpha)
            for g in usable
        }
        plain = _trial(model, {}, seen, calibration, context.target)
        scaled = _trial(
            model, {v.name or "": s for v, s in scales.items()}, seen, calibration, context.target
        )
        chosen = {}
        for group in usable:
            gain = min(scaled[layer.name] - plain[layer.name] for layer in group.layers)
            kept = scaled if gain >= self.min_gain else plain
            findings.measured |= {layer.name: kept[layer.name] for layer in group.layers}
            if gain >= self.min_gain:
                chosen[group.value] = scales[group.value]
            else:
                findings.skip(
                    group.name, f"scaling gains {gain:.1f} dB in int8, below min-gain={self.min_gain:g}"
                )
        return chosen


def smoothing_scales(activation_peaks: Array, weight_peaks: Array, alpha: float) -> Array:
    """Return s of SmoothQuant's equation 4, float32 [channels], normalised to geometric mean 1.

    Args:
        activation_peaks: largest magnitude of each input channel.
        weight_peaks: largest magnitude of each row of W.
        alpha: migration strength.
    """
    dead = (activation_peaks < _FLOOR) | (weight_peaks < _FLOOR)
    x, w = np.maximum(activation_peaks, _FLOOR), np.maximum(weight_peaks, _FLOOR)
    logs = np.where(dead, 0.0, alpha * np.log(x) - (1 - alpha) * np.log(w))
    alive = ~dead
    logs = np.where(alive, logs - (logs[alive].mean() if alive.any() else 0.0), 0.0)
    return np.exp(logs).astype(np.float32)


def _already(group: ScaleGroup) -> str | None:
    producer = group.value.producer()
    if group.absorbed and group.norm is not None and (group.norm.inputs[1].name or "").endswith("_folded"):  # type: ignore[union-attr]
        return "its scales are folded already"
    if producer is not None and producer.op_type == "Mul" and (group.value.name or "").endswith("_scaled_in"):
        return "its scales are folded already"
    return None


def _peaks(extremes: tuple[Array, Array]) -> Array:
    return np.maximum(-extremes[0], extremes[1])


def _usable(group: ScaleGroup, seen: Extremes, findings: Findings) -> bool:
    found = seen.get(group.value.name or "")
    if found is None or not np.isfinite(found).all() or _peaks(found).max(initial=0.0) > 1e20:
        findings.skip(group.name, "calibration saw no finite range of its input")
        return False
    return True


def _trial(
    model: ir.Model, scales: Mapping[str, Array], seen: Extremes, calibration: Calibration, target: Target
) -> Mapping[str, float]:
    """Return the local static int8 SQNR of every linear layer with the inputs named in `scales` scaled."""
    copy = model.clone()
    forget_names(copy)
    grids = {}
    for group in scale_groups(copy):
        name = group.value.name or ""
        if name not in seen:
            continue
        low, high = seen[name]
        scale = scales.get(name, np.ones_like(low))
        inner = _apply(group, scale, explicit=True) if name in scales else group.value
        grids[inner.name or ""] = activation_grid(float((low / scale).min()), float((high / scale).max()))
    layers = [layer for layer in find_layers(copy)[0] if layer.is_linear and layer.input.name in grids]
    return local_sqnr(copy, trial_carrier(layers, grids, 127), calibration, target)


def _apply(group: ScaleGroup, scale: Array, *, explicit: bool = False) -> ir.Value:
    """Scale the group's input by 1 / `scale` and its weights by `scale`; return the scaled input."""
    first = group.layers[0].node
    graph = first.graph
    if graph is None:
        raise ValueError(f"{group.name} is in no graph")
    inner = group.value
    if group.absorbed and group.norm is not None and not explicit:
        _fold_into_norm(group.norm, graph, scale)
    else:
        inverse = add_initializer(graph, f"{group.value.name}_inverse_scale", (1 / scale).astype(np.float32))
        inner = emit(
            first, "Mul", [group.value, inverse], names=[f"{group.value.name}_scaled_in"], like=group.value
        )
        if inner.shape is not None:
            inner.shape = ir.Shape([*inner.shape[:-1], len(scale)])
    for layer in group.layers:
        weight = (layer.weight_array() * scale[:, None]).astype(np.float32)
        layer.node.replace_input_with(1, add_initializer(graph, f"{layer.weight.name}_scaled", weight))
        layer.node.replace_input_with(0, inner)
        drop_initializer(layer.weight)
    return inner


def _fold_into_norm(norm: ir.Node, graph: ir.Graph, scale: Array) -> None:
    for index in (1, 2):
        value = norm.inputs[index] if len(norm.inputs) > index else None
        if value is not None:
            tensor = constant_array(value)
            norm.replace_input_with(
                index, add_initializer(graph, f"{value.name}_folded", (tensor / scale).astype(np.float32))
            )
            drop_initializer(value)
    rename(norm.outputs[0], f"{norm.outputs[0].name}_scaled")


def constant_array(value: ir.Value) -> Array:
    """Return the array of an initializer."""
    if value.const_value is None:
        raise ValueError(f"'{value.name}' is not constant")
    return np.asarray(value.const_value.numpy())
