# SPDX-License-Identifier: Apache-2.0
"""Resize and Upsample: along each axis an element of the output is a weighted sum of a few of the input."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from splitfold.runtime.feeds import Array
from splitfold.runtime.lift.carried import integers
from splitfold.runtime.lift.row import Row, Rows, since

__all__ = ["ROWS"]


@dataclass(frozen=True)
class _Rule:
    """How elements are weighted: the attributes of Resize."""

    mode: str
    coordinates: str = "asymmetric"
    nearest: str = "floor"
    cubic: float = -0.75
    exclude_outside: bool = False
    antialias: bool = False
    extrapolation: float = 0.0


@dataclass(frozen=True)
class _Axis:
    """Sizes and scale of one axis, and the part of it that is resized."""

    length: int
    wanted: int
    scale: float
    start: float = 0.0
    end: float = 1.0


def resize(
    x: Tensor,
    roi: Any = None,
    scales: Any = None,
    sizes: Any = None,
    *,
    antialias: int = 0,
    axes: tuple[int, ...] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """Resize, opset 11 on."""
    rule = _Rule(
        mode,
        coordinate_transformation_mode,
        nearest_mode,
        cubic_coeff_a,
        bool(exclude_outside),
        bool(antialias),
        extrapolation_value,
    )
    chosen = [axis % x.ndim for axis in axes] if axes else list(range(x.ndim))
    lengths = [x.shape[axis] for axis in chosen]
    if scales is not None and np.size(scales):
        factors = np.asarray(scales, np.float32).tolist()
        wanted = [math.floor(length * factor) for length, factor in zip(lengths, factors, strict=True)]
    else:
        wanted, factors = _sized(lengths, integers(sizes), keep_aspect_ratio_policy)
    borders = (
        np.asarray(roi, np.float64).tolist()
        if np.size(roi) == 2 * len(chosen) and roi is not None
        else ([0.0] * len(chosen) + [1.0] * len(chosen))
    )
    for i, axis in enumerate(chosen):
        line = _Axis(lengths[i], wanted[i], factors[i], borders[i], borders[i + len(chosen)])
        x = _resize_axis(x, axis, line, rule)
    return x


def _sized(lengths: list[int], wanted: list[int], policy: str) -> tuple[list[int], list[float]]:
    """Return sizes and scales where sizes are given, all of one scale where the aspect ratio is kept."""
    factors = [size / length for size, length in zip(wanted, lengths, strict=True)]
    if policy == "stretch":
        return wanted, factors
    factor = min(factors) if policy == "not_larger" else max(factors)
    return [math.floor(length * factor + 0.5) for length in lengths], [factor] * len(lengths)


def _resize_axis(x: Tensor, axis: int, line: _Axis, rule: _Rule) -> Tensor:
    cropped = rule.coordinates == "tf_crop_and_resize"
    if line.length == line.wanted and line.scale == 1 and (not cropped or (line.start, line.end) == (0, 1)):
        return x
    places, weights, outside = _taps(line, rule)
    total: Tensor | None = None
    for tap in range(places.shape[1]):
        read = x.index_select(axis, torch.from_numpy(places[:, tap].copy()).to(x.device))
        if weights is not None:
            shape = [-1 if i == axis else 1 for i in range(x.ndim)]
            weight = torch.from_numpy(weights[:, tap].copy()).to(x.device, _real(x))
            read = read * weight.reshape(shape)
        total = read if total is None else total + read
    if total is None:
        raise ValueError("no taps")
    total = total.to(x.dtype)
    if outside is None:
        return total
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]
    mask = torch.from_numpy(outside).to(x.device).reshape(shape)
    return torch.where(mask, torch.full_like(total, rule.extrapolation), total)


def _real(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype.is_floating_point else torch.float32


@functools.lru_cache(maxsize=256)
def _taps(line: _Axis, rule: _Rule) -> tuple[Array, Array | None, Array | None]:
    """Return which elements each output reads [wanted, taps], their weights or None, and what is outside."""
    place = _coordinates(line, rule.coordinates)
    outside = None
    if rule.coordinates == "tf_crop_and_resize":
        outside = (place < 0) | (place > line.length - 1)
    if rule.mode == "nearest":
        nearest = np.clip(_NEAREST[rule.nearest](place), 0, line.length - 1).astype(np.int64)
        return nearest[:, None], None, outside
    first = np.floor(place)
    near = _reach(line, rule)
    taps = np.arange(1 - near, near + 1)
    shrink = min(line.scale, 1.0) if rule.antialias else 1.0
    distance = np.abs((place - first)[:, None] - taps) * shrink
    weights = np.clip(1 - distance, 0, None) if rule.mode == "linear" else _cubic(distance, rule.cubic)
    places = first[:, None] + taps
    if rule.exclude_outside:
        weights = np.where((places < 0) | (places >= line.length), 0, weights)
    if rule.exclude_outside or rule.antialias:
        weights = weights / weights.sum(1, keepdims=True)
    return np.clip(places, 0, line.length - 1).astype(np.int64), weights, outside


_NEAREST: dict[str, Any] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_floor": lambda place: np.ceil(place - 0.5),
    "round_prefer_ceil": lambda place: np.floor(place + 0.5),
}


def _reach(line: _Axis, rule: _Rule) -> int:
    """Return how many elements to each side have a weight."""
    reach = 1 if rule.mode == "linear" else 2
    return math.ceil(reach / line.scale) if rule.antialias and line.scale < 1 else reach


def _cubic(distance: Array, a: float) -> Array:
    """Return Keys' cubic convolution kernel (1981) at distances of up to 2."""
    inner = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    outer = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance <= 1, inner, np.where(distance < 2, outer, 0))


def _coordinates(line: _Axis, mode: str) -> Array:
    """Return the place in the input of each element of the output."""
    at, last = np.arange(line.wanted, dtype=np.float64), line.length - 1
    if mode == "asymmetric":
        return at / line.scale
    if mode == "align_corners":
        return at * last / (line.wanted - 1) if line.wanted > 1 else np.zeros(1)
    if mode == "tf_crop_and_resize":
        if line.wanted <= 1:
            return np.full(line.wanted, 0.5 * (line.start + line.end) * last)
        return line.start * last + at * (line.end - line.start) * last / (line.wanted - 1)
    if mode == "pytorch_half_pixel" and line.wanted <= 1:
        return np.zeros(line.wanted)
    place: Array = (at + 0.5) / line.scale
    if mode == "tf_half_pixel_for_nn":
        return place
    if mode == "half_pixel_symmetric":
        place = place + line.length / 2 * (1 - line.wanted / (line.scale * line.length))
    return place - 0.5


def resize_by_scales(x: Tensor, scales: Any, *, mode: str = "nearest") -> Tensor:
    """Resize, opset 10, and Upsample, opset 9."""
    return upsample(x, scales=tuple(np.asarray(scales).tolist()), mode=mode)


def upsample(x: Tensor, *, scales: tuple[float, ...], mode: str = "nearest") -> Tensor:
    """Upsample, opset 7."""
    rule = _Rule(mode)
    for axis, scale in enumerate(scales):
        length = x.shape[axis]
        x = _resize_axis(x, axis, _Axis(length, math.floor(length * scale), scale), rule)
    return x


ROWS: Rows = {
    "Resize": since(11, Row(resize, host=(1, 2, 3)), Row(resize_by_scales, host=(1,), since=10)),
    "Upsample": since(9, Row(resize_by_scales, host=(1,)), Row(upsample, since=7)),
}
