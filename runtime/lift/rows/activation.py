# SPDX-License-Identifier: Apache-2.0
"""Activations, softmax and dropout."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from splitfold.runtime.lift.row import Row, Rows, since

__all__ = ["ROWS", "gelu", "hard_sigmoid", "leaky_relu", "softmax"]


def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Elu."""
    return F.elu(x, alpha)


def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Celu."""
    return F.celu(x, alpha)


def selu(x: Tensor, *, alpha: float = 1.6732631921768188, gamma: float = 1.0507010221481323) -> Tensor:
    """Selu: gamma * (x, or alpha * (e^x - 1) below 0)."""
    return gamma * F.elu(x, alpha)


def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    """LeakyRelu."""
    return F.leaky_relu(x, alpha)


def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """ThresholdedRelu: x above alpha, else 0."""
    return torch.where(x > alpha, x, torch.zeros_like(x))


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """PRelu."""
    return torch.where(x < 0, x * slope, x)


def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """HardSigmoid: alpha * x + beta, kept in 0..1."""
    return torch.clamp(alpha * x + beta, 0, 1)


def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    """Shrink: towards 0 by `bias` outside of -lambd..lambd, 0 inside."""
    zero = torch.zeros_like(x)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, zero)).to(x.dtype)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """Gelu, exact or by tanh (Hendrycks and Gimpel, arXiv:1606.08415)."""
    return F.gelu(x, approximate=approximate)


def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Swish: x * sigmoid(alpha * x)."""
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


def swiglu(gate: Tensor, value: Tensor, *, alpha: float = 1.0) -> Tensor:
    """SwiGLU: the gate's Swish times the value."""
    return swish(gate, alpha=alpha) * value


def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Softmax along one axis, opset 13."""
    return torch.softmax(x, axis)


def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """LogSoftmax along one axis, opset 13."""
    return torch.log_softmax(x, axis)


def hardmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Hardmax along one axis, opset 13: 1 at the first largest element."""
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1)


def flat_softmax(x: Tensor, *, axis: int = 1) -> Tensor:
    """Softmax before opset 13: over all axes from `axis` on at once."""
    return torch.softmax(_rows(x, axis), -1).reshape(x.shape)


def flat_log_softmax(x: Tensor, *, axis: int = 1) -> Tensor:
    """LogSoftmax before opset 13."""
    return torch.log_softmax(_rows(x, axis), -1).reshape(x.shape)


def flat_hardmax(x: Tensor, *, axis: int = 1) -> Tensor:
    """Hardmax before opset 13."""
    return hardmax(_rows(x, axis)).reshape(x.shape)


def _rows(x: Tensor, axis: int) -> Tensor:
    return x.reshape(math.prod(x.shape[: axis + x.ndim if axis < 0 else axis]), -1)


def dropout(
    x: Tensor, ratio: Any = None, training_mode: Any = None, *, seed: int | None = None
) -> tuple[Tensor, Tensor]:
    """Dropout, opset 12: (output, mask of what was kept); numbers are drawn from torch's generator."""
    rate = 0.5 if ratio is None else float(np.asarray(ratio).item())
    if training_mode is None or not np.asarray(training_mode).item() or not rate:
        return x, torch.ones_like(x, dtype=torch.bool)
    kept = torch.rand_like(x, dtype=torch.float32) >= rate
    return x * kept / (1 - rate), kept


def dropout_of_inference(x: Tensor, *, ratio: float = 0.5) -> tuple[Tensor, Tensor]:
    """Dropout, opset 7: nothing is dropped in inference."""
    return x, torch.ones_like(x, dtype=torch.bool)


ROWS: Rows = {
    "Celu": Row(celu),
    "Dropout": since(12, Row(dropout, host=(1, 2), many=True), Row(dropout_of_inference, many=True, since=7)),
    "Elu": Row(elu),
    "Gelu": Row(gelu),
    "HardSigmoid": Row(hard_sigmoid),
    "HardSwish": Row(F.hardswish),
    "Hardmax": since(13, Row(hardmax), Row(flat_hardmax)),
    "LeakyRelu": Row(leaky_relu),
    "LogSoftmax": since(13, Row(log_softmax), Row(flat_log_softmax)),
    "Mish": Row(F.mish),
    "PRelu": Row(prelu, since=7),
    "Relu": Row(torch.relu),
    "Selu": Row(selu),
    "Shrink": Row(shrink),
    "Sigmoid": Row(torch.sigmoid),
    "Softmax": since(13, Row(softmax), Row(flat_softmax)),
    "Softplus": Row(F.softplus),
    "Softsign": Row(F.softsign),
    "SwiGLU": Row(swiglu),
    "Swish": Row(swish),
    "ThresholdedRelu": Row(thresholded_relu),
}
