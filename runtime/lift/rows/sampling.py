# SPDX-License-Identifier: Apache-2.0
"""Images read at computed places: AffineGrid, GridSample."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from splitfold.runtime.lift.carried import integers
from splitfold.runtime.lift.row import Row, Rows

__all__ = ["ROWS"]

_MODES = {"linear": "bilinear", "cubic": "bicubic"}


def affine_grid(theta: Tensor, size: Any, *, align_corners: int = 0) -> Tensor:
    """AffineGrid, of two or three dimensions."""
    return F.affine_grid(theta, integers(size), bool(align_corners))


def grid_sample(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> Tensor:
    """GridSample; up to opset 19 the modes have torch's names."""
    return F.grid_sample(x, grid, _MODES.get(mode, mode), padding_mode, bool(align_corners))


ROWS: Rows = {
    "AffineGrid": Row(affine_grid, host=(1,)),
    "GridSample": Row(grid_sample),
}
