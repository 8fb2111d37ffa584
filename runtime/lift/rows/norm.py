# SPDX-License-Identifier: Apache-2.0
"""Normalizations."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from splitfold.runtime.lift.dtypes import torch_dtype
from splitfold.runtime.lift.row import Attributes, Extra, Row, Rows, since

__all__ = ["ROWS", "layer_norm", "rms_norm"]


def batch_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
    spatial: int = 1,
    outputs: int,
) -> tuple[Tensor, ...]:
    """BatchNormalization, opset 7: (output, and in training running mean and variance)."""
    if not training_mode:
        return (_by_channel(x, scale, bias, mean, variance, epsilon),)
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    seen, spread = x.mean(axes), x.var(axes, unbiased=False)
    running = (old * momentum + new * (1 - momentum) for old, new in ((mean, seen), (variance, spread)))
    return (_by_channel(x, scale, bias, seen, spread, epsilon), *running)


def _by_channel(
    x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, epsilon: float
) -> Tensor:
    trained = mean.requires_grad or variance.requires_grad  # torch takes them as given
    if x.dtype is scale.dtype is mean.dtype and not trained:
        return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)
    shape = [1, -1] + [1] * (x.ndim - 2)
    mean, variance, scale, bias = (item.reshape(shape) for item in (mean, variance, scale, bias))
    return ((x - mean) * torch.rsqrt(variance + epsilon) * scale + bias).to(x.dtype)


def refuse_batch_norm(_: ir.Node, attributes: Attributes) -> str | None:
    """Return why a batch normalization is not handled, or None."""
    return None if attributes.get("spatial", 1) else "its attribute 'spatial' is 0"


def instance_norm(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """InstanceNormalization."""
    return F.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


def layer_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    outputs: int = 1,
) -> tuple[Tensor, ...]:
    """LayerNormalization over all axes from `axis` on: (output, mean, inverse standard deviation)."""
    at, stash = axis % x.ndim, torch_dtype(stash_type)
    shape = x.shape[at:]
    if outputs == 1 and scale.shape == shape and x.dtype in (stash, torch.float64):
        return (F.layer_norm(x, shape, scale, bias, epsilon),)
    axes = tuple(range(at, x.ndim))
    wide = x.to(stash)
    mean = wide.mean(axes, True)
    inverse = torch.rsqrt((wide - mean).square().mean(axes, True) + epsilon)
    found = ((wide - mean) * inverse).to(x.dtype) * scale
    return (found if bias is None else found + bias, mean, inverse)


def rms_norm(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """RMSNormalization over all axes from `axis` on (arXiv:1910.07467)."""
    axes = tuple(range(axis % x.ndim, x.ndim))
    wide = x.to(torch_dtype(stash_type))
    return (wide * torch.rsqrt(wide.square().mean(axes, True) + epsilon)).to(x.dtype) * scale


def group_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Tensor:
    """GroupNormalization, opset 21: scale and bias a channel."""
    wide = x.to(torch_dtype(stash_type)) if x.dtype.itemsize < 4 else x
    shape = [1, -1] + [1] * (x.ndim - 2)
    normal = F.group_norm(wide, num_groups, eps=epsilon).to(x.dtype)
    return normal * scale.reshape(shape) + bias.reshape(shape)


def group_norm_by_group(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5
) -> Tensor:
    """GroupNormalization, opset 18: scale and bias a group."""
    times = x.shape[1] // num_groups
    wide = (item.repeat_interleave(times) for item in (scale, bias))
    return group_norm(x, *wide, num_groups=num_groups, epsilon=epsilon)


def lp_norm(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """LpNormalization; where the norm is 0 so is the result."""
    norm = torch.linalg.vector_norm(x, p, axis, True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


def mean_variance_norm(x: Tensor, *, axes: tuple[int, ...] = (0, 2, 3)) -> Tensor:
    """MeanVarianceNormalization, as the specification's function body: (x - mean) / (deviation + 1e-9)."""
    mean = x.mean(axes, True)
    deviation = (x.square().mean(axes, True) - mean.square()).sqrt()
    return (x - mean) / (deviation + 1e-9)


def local_response_norm(
    x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> Tensor:
    """LRN across channels: x / (bias + alpha / size * sum of squares nearby) ^ beta."""
    before = (size - 1) // 2
    squares = F.pad(x.square().movedim(1, -1), (before, size - 1 - before))
    nearby = squares.unfold(-1, size, 1).sum(-1).movedim(-1, 1)
    return x / (bias + alpha / size * nearby) ** beta


ROWS: Rows = {
    "BatchNormalization": Row(
        batch_norm, many=True, fixed=(3, 4), extras=(Extra.OUTPUTS,), since=7, refuses=refuse_batch_norm
    ),
    "GroupNormalization": since(21, Row(group_norm), Row(group_norm_by_group)),
    "InstanceNormalization": Row(instance_norm, since=6),
    "LRN": Row(local_response_norm),
    "LayerNormalization": Row(layer_norm, many=True, extras=(Extra.OUTPUTS,)),
    "LpNormalization": Row(lp_norm),
    "MeanVarianceNormalization": Row(mean_variance_norm),
    "RMSNormalization": Row(rms_norm),
}
