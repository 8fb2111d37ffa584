# SPDX-License-Identifier: Apache-2.0
"""com.microsoft operators that stand for several: products, activations and normalizations in one."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from splitfold.runtime.lift.row import Attributes, Extra, Row, Rows
from splitfold.runtime.lift.rows.activation import gelu, hard_sigmoid, leaky_relu
from splitfold.runtime.lift.rows.conv import Ints, conv
from splitfold.runtime.lift.rows.indexing import gather
from splitfold.runtime.lift.rows.linear import gemm
from splitfold.runtime.lift.rows.norm import layer_norm

__all__ = ["ROWS", "RUNTIME_ROWS"]


def fused_matmul(
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    transA: int = 0,  # noqa: N803
    transB: int = 0,  # noqa: N803
    transBatchA: int = 0,  # noqa: N803
    transBatchB: int = 0,  # noqa: N803
) -> Tensor:
    """FusedMatMul: alpha * A B, transposed where asked for."""
    product = (a.transpose(-1, -2) if transA else a) @ (b.transpose(-1, -2) if transB else b)
    return product if alpha == 1 else alpha * product


def refuse_batch_transposes(_: ir.Node, attributes: Attributes) -> str | None:
    """Return why a FusedMatMul is not handled, or None."""
    moved = attributes.get("transBatchA", 0) or attributes.get("transBatchB", 0)
    return "transposed batch axes are not handled" if moved else None


_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "": lambda x: x,
    "Relu": torch.relu,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "LeakyRelu": lambda x, alpha=0.01: leaky_relu(x, alpha=alpha),
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5: hard_sigmoid(x, alpha=alpha, beta=beta),
    "Clip": torch.clamp,
}


def refuse_activation(_: ir.Node, attributes: Attributes) -> str | None:
    """Return why a fused activation is not handled, or None."""
    name = attributes.get("activation", "")
    return None if name in _ACTIVATIONS else f"its activation '{name}' is not handled"


def fused_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    added: Tensor | None = None,
    *,
    activation: str = "",
    activation_params: tuple[float, ...] = (),
    auto_pad: str = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """FusedConv: a Conv, what is added to it, and an activation."""
    found = conv(
        x, weight, bias, auto_pad=auto_pad, dilations=dilations, group=group, pads=pads, strides=strides
    )
    return _ACTIVATIONS[activation](found if added is None else found + added, *activation_params)


def fused_gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    activation: str = "",
    activation_alpha: float | None = None,
    activation_beta: float | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803
    transB: int = 0,  # noqa: N803
) -> Tensor:
    """FusedGemm: a Gemm and an activation."""
    found = gemm(a, b, c, alpha=alpha, beta=beta, transA=transA, transB=transB)
    given = [number for number in (activation_alpha, activation_beta) if number is not None]
    return _ACTIVATIONS[activation](found, *given)


def exact_gelu(x: Tensor) -> Tensor:
    """Gelu."""
    return gelu(x)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """BiasGelu."""
    return gelu(x + bias)


def fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """FastGelu, by tanh."""
    return gelu(x if bias is None else x + bias, approximate="tanh")


def quick_gelu(x: Tensor, *, alpha: float = 1.702) -> Tensor:
    """QuickGelu: x * sigmoid(alpha * x)."""
    return x * torch.sigmoid(alpha * x)


def skip_layer_norm(
    x: Tensor,
    skip: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    outputs: int,
) -> tuple[Tensor | None, ...]:
    """SkipLayerNormalization: (output, mean, inverse deviation, the sum that is normalized)."""
    total = x + skip if bias is None else x + skip + bias
    if outputs == 1:
        return layer_norm(total, gamma, beta, epsilon=epsilon, outputs=1)
    return (*layer_norm(total, gamma, beta, epsilon=epsilon, outputs=3), total)


def simplified_layer_norm(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> tuple[Tensor, Tensor]:
    """SimplifiedLayerNormalization (arXiv:1910.07467): (output, inverse root of the mean square)."""
    axes = tuple(range(axis % x.ndim, x.ndim))
    wide = x.float() if x.dtype.itemsize < 4 else x
    inverse = torch.rsqrt(wide.square().mean(axes, True) + epsilon)
    return (wide * inverse).to(x.dtype) * scale, inverse


def skip_simplified_layer_norm(
    x: Tensor, skip: Tensor, gamma: Tensor, bias: Tensor | None = None, *, epsilon: float = 1e-12
) -> tuple[Tensor | None, ...]:
    """SkipSimplifiedLayerNormalization: (output, none, inverse, the sum that is normalized)."""
    total = x + skip if bias is None else x + skip + bias
    found, inverse = simplified_layer_norm(total, gamma, epsilon=epsilon)
    return found, None, inverse, total


def embed_layer_norm(
    ids: Tensor,
    segments: Tensor | None,
    words: Tensor,
    places: Tensor,
    kinds: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    mask_index_type: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """EmbedLayerNormalization: (output, tokens of each sample, the sum that is normalized)."""
    at = places[: ids.shape[1]] if positions is None else F.embedding(positions.long(), places)
    total = gather(words, ids.long()) + at
    if segments is not None and kinds is not None:
        total = total + gather(kinds, segments.long())
    counts = torch.zeros(len(ids), dtype=torch.int32, device=ids.device)
    counts = counts if mask is None else mask.sum(1).to(torch.int32)
    (found,) = layer_norm(total, gamma, beta, epsilon=epsilon, outputs=1)
    return found, counts, total


_OUTPUTS = (Extra.OUTPUTS,)

ROWS: Rows = {
    "BiasGelu": Row(bias_gelu),
    "EmbedLayerNormalization": Row(embed_layer_norm, many=True),
    "FastGelu": Row(fast_gelu),
    "FusedConv": Row(fused_conv, refuses=refuse_activation),
    "FusedGemm": Row(fused_gemm, refuses=refuse_activation),
    "FusedMatMul": Row(fused_matmul, refuses=refuse_batch_transposes),
    "Gelu": Row(exact_gelu),
    "QuickGelu": Row(quick_gelu),
    "SkipLayerNormalization": Row(skip_layer_norm, many=True, extras=_OUTPUTS),
    "SkipSimplifiedLayerNormalization": Row(skip_simplified_layer_norm, many=True),
}

RUNTIME_ROWS: Rows = {"SimplifiedLayerNormalization": Row(simplified_layer_norm, many=True)}
"""Operators of the runtime that stand in the default domain."""
