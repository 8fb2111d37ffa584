# SPDX-License-Identifier: Apache-2.0
"""Which weights have settled on a code (confidence-guided annealing, OFQ, arXiv 2302.02210)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from splitfold.runtime.training.fake_weights import FakeWeight

__all__ = ["settled"]


def settled(
    parameters: Mapping[str, nn.Parameter], grids: Mapping[str, FakeWeight], barrier: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return, for each trained weight on a grid, where it is further than `barrier` steps from any threshold
    between two codes, and a copy of its numbers."""
    return {
        name: (grid.to_threshold(parameters[name]) > barrier, parameters[name].detach().clone())
        for name, grid in grids.items()
        if name in parameters
    }
