# SPDX-License-Identifier: Apache-2.0
"""Activations as one static grid would leave them, with straight-through gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from splitfold.runtime.lift.rows.quantize import quantized

__all__ = ["FakeInput"]


class FakeInput(nn.Module):
    """Maps a tensor to an asymmetric grid of the range that was seen so far.

    While training the range is a running mean of the batches' extremes (Jacob et al., CVPR 2018, section
    3.1); the first batch sets it. Otherwise it stays.

    Args:
        bits: width of a code, 2 to 8.
        momentum: how much of the old range each batch leaves.
    """

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self, bits: int, momentum: float) -> None:
        super().__init__()
        self.bits, self.momentum = bits, momentum
        for name, kind in (("low", torch.float32), ("high", torch.float32), ("seen", torch.bool)):
            self.register_buffer(name, torch.zeros((), dtype=kind))

    def forward(self, x: Tensor) -> Tensor:
        """Return x on the grid; the gradient is that of the identity, and 0 beyond the range."""
        if self.training:
            self._look(x.detach())
        top = 2**self.bits - 1
        scale = (self.high - self.low) / top
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        zero = (-self.low / scale).round().clamp(0, top)
        return (quantized(x / scale, zero, (0, top)) - zero) * scale

    def _look(self, x: Tensor) -> None:
        low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
        kept = self.momentum * self.seen
        self.low.copy_(kept * self.low + (1 - kept) * low)
        self.high.copy_(kept * self.high + (1 - kept) * high)
        self.seen.fill_(True)
