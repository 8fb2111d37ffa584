# SPDX-License-Identifier: Apache-2.0
"""Weights as a grid of few bits would leave them, with straight-through gradients."""

from __future__ import annotations

import enum

import torch
from torch import Tensor, nn

from splitfold.runtime.lift.rows.quantize import rounded

__all__ = ["FakeWeight", "WeightScale"]

_BELOW_ONE = 1 - 1e-6


class WeightScale(enum.Enum):
    """What the grid of an output channel follows."""

    RANGE = "range"
    """Its largest magnitude: q = round(w / s), s = max|w| / (2^(bits-1) - 1), as symmetric quantizers do."""
    STATISTICS = "statistics"
    """Its mean magnitude (StatsQ of OFQ, arXiv 2302.02210, as its code has it): s = 2 mean|w|, weights are
    cut to s, and the levels are the odd multiples of s / 2^bits: none is zero."""


class FakeWeight(nn.Module):
    """Maps a weight to its grid; the scale is found again at each step and takes no gradient.

    Args:
        bits: width of a code, 2 to 8.
        axis: axis of the weight that indexes output channels.
        scale: what the grid follows.
    """

    def __init__(self, bits: int, axis: int, scale: WeightScale) -> None:
        super().__init__()
        self.bits, self.axis, self.scale = bits, axis, scale

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight on its grid; its gradient is that of the identity, 0 where a weight is cut."""
        step, steps, limit = self._steps(weight)
        if self.scale is WeightScale.RANGE:
            return rounded(steps.clamp(-limit, limit)) * step
        return (rounded(steps) + 0.5) * step

    def to_threshold(self, weight: Tensor) -> Tensor:
        """Return how far each weight is from where its code changes, in steps: 0 to 0.5."""
        steps = self._steps(weight.detach())[1]
        return (steps - steps.floor() - 0.5).abs()

    def _steps(self, weight: Tensor) -> tuple[Tensor, Tensor, int]:
        """Return the step of each channel, the weight in steps (of which the rounded number is the code), and
        the largest code."""
        seen = weight.detach().abs()
        others = [axis for axis in range(weight.ndim) if axis != self.axis % weight.ndim]
        half = 2 ** (self.bits - 1)
        if self.scale is WeightScale.RANGE:
            step = seen.amax(others, keepdim=True) / (half - 1)
            step = torch.where(step == 0, torch.ones_like(step), step)
            return step, weight / step, half - 1
        whole = 2 * seen.mean(others, keepdim=True)
        whole = torch.where(whole == 0, torch.ones_like(whole), whole)
        cut = (weight / whole).clamp(-1, _BELOW_ONE)
        return whole / half, cut * half - 0.5, half
