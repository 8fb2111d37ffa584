# SPDX-License-Identifier: Apache-2.0
"""Matrix products."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from splitfold.runtime.lift.row import Row, Rows

__all__ = ["ROWS", "gemm"]


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803
    transB: int = 0,  # noqa: N803
) -> Tensor:
    """Gemm: alpha * A B + beta * C, A and B transposed where asked for."""
    plain = alpha == 1 and beta == 1 and a.dtype.is_floating_point
    if plain and transB and not transA and (c is None or (c.ndim == 1 and len(c) == b.shape[0])):
        return F.linear(a, b, c)
    left, right = a.T if transA else a, b.T if transB else b
    if plain and c is not None:
        return torch.addmm(c, left, right)
    product = left @ right
    product = product if alpha == 1 else (alpha * product).to(a.dtype)
    if c is None or not beta:
        return product
    return product + (c if beta == 1 else (beta * c).to(a.dtype))


def einsum(*tensors: Tensor, equation: str) -> Tensor:
    """Einsum."""
    return torch.einsum(equation, *tensors)


ROWS: Rows = {
    "Det": Row(torch.linalg.det),
    "Einsum": Row(einsum),
    "Gemm": Row(gemm, since=7),
    "MatMul": Row(torch.matmul),
}
