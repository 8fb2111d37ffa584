# SPDX-License-Identifier: Apache-2.0
"""Loss functions."""

from __future__ import annotations

import torch
from torch import Tensor

from splitfold.runtime.lift.row import Row, Rows

__all__ = ["ROWS"]


def negative_log_likelihood(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """NegativeLogLikelihoodLoss: classes are axis 1; with weights the mean is divided by their sum."""
    labels = target.long()
    ignored = torch.zeros_like(labels, dtype=torch.bool) if ignore_index is None else labels == ignore_index
    safe = torch.where(ignored, torch.zeros_like(labels), labels)
    kept = (~ignored).to(x.dtype) if weight is None else torch.where(ignored, 0, weight[safe])
    loss = -x.gather(1, safe.unsqueeze(1)).squeeze(1) * kept
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.mean() if weight is None and ignore_index is None else loss.sum() / kept.sum()


def softmax_cross_entropy(
    x: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """SoftmaxCrossEntropyLoss: (loss, logarithms of the probabilities)."""
    logs = torch.log_softmax(x, 1)
    loss = negative_log_likelihood(logs, labels, weights, ignore_index=ignore_index, reduction=reduction)
    return loss, logs


ROWS: Rows = {
    "NegativeLogLikelihoodLoss": Row(negative_log_likelihood),
    "SoftmaxCrossEntropyLoss": Row(softmax_cross_entropy, many=True),
}
