# SPDX-License-Identifier: Apache-2.0
"""Before and after the loop: the default optimiser, and weights put on the grid they trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from splitfold.runtime.lift.lifted import Lifted
from splitfold.runtime.training.fake_weights import FakeWeight, WeightScale
from splitfold.runtime.training.loop import Optimizer

__all__ = ["adamw", "put_on_grid"]


def adamw(rate: float) -> Optimizer:
    """Return what makes AdamW of this rate, without weight decay."""

    def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)

    return make


def put_on_grid(lifted: Lifted, grids: Mapping[str, FakeWeight]) -> None:
    """Write the weights with a grid of their statistics, where trained, as that grid leaves them."""
    parameters = dict(lifted.module.named_parameters())
    with torch.no_grad():
        for name, grid in grids.items():
            if grid.scale is WeightScale.STATISTICS and parameters[name].requires_grad:
                parameters[name].copy_(grid(parameters[name]))
