# SPDX-License-Identifier: Apache-2.0
"""Shapes, new tensors and element types: Shape, Size, ConstantOfShape, Range, EyeLike, OneHot, Cast..."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from splitfold.runtime.lift import host
from splitfold.runtime.lift.carried import integers
from splitfold.runtime.lift.dtypes import TORCH, torch_dtype
from splitfold.runtime.lift.row import Attributes, Extra, Row, Rows

__all__ = ["ROWS"]


def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Any:
    """Shape; `start` and `end` from opset 15."""
    return np.array(x.shape[start:end], np.int64)


def size(x: Tensor) -> Any:
    """Size."""
    return np.array(x.numel(), np.int64)


def constant_of_shape(
    sizes: Any, *, value: tuple[Any, torch.dtype] = (0.0, torch.float32), anchor: Tensor
) -> Tensor:
    """ConstantOfShape."""
    return torch.full(integers(sizes), value[0], dtype=value[1], device=anchor.device)


def range_(start: Any, limit: Any, delta: Any, *, anchor: Tensor) -> Tensor:
    """Range: start + i * delta for i below ceil((limit - start) / delta)."""
    kind = np.asarray(start).dtype
    first, end, step = (_item(number) for number in (start, limit, delta))
    count = max(math.ceil((end - first) / step), 0)
    steps = torch.arange(count, device=anchor.device, dtype=torch.from_numpy(np.empty(0, kind)).dtype)
    return steps.mul(step).add(first)


def _item(number: Any) -> Any:
    return np.asarray(number).item()


def eye_like(x: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    """EyeLike."""
    kind = x.dtype if dtype is None else torch_dtype(dtype)
    return torch.ones(x.shape, device=x.device).tril(k).triu(k).to(kind)


def trilu(x: Tensor, k: Any = None, *, upper: int = 1) -> Tensor:
    """Trilu."""
    diagonal = 0 if k is None else integers(k)[0]
    return x.triu(diagonal) if upper else x.tril(diagonal)


def one_hot(indices: Tensor, depth: Any, values: Tensor, *, axis: int = -1) -> Tensor:
    """OneHot: negative indices count from the end, indices out of range get no 1."""
    count = integers(depth)[0]
    places = indices.long()
    places = torch.where(places < 0, places + count, places)
    rank = indices.ndim + 1
    at = axis % rank
    classes = torch.arange(count, device=indices.device).reshape([-1 if i == at else 1 for i in range(rank)])
    return torch.where(places.unsqueeze(at) == classes, values[1], values[0])


def cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """Cast: towards zero to integers; types of 8 bits saturate where asked to."""
    return _cast(x, torch_dtype(to), bool(saturate))


def cast_like(x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """CastLike."""
    return _cast(x, like.dtype, bool(saturate))


def _cast(x: Tensor, dtype: torch.dtype, saturate: bool) -> Tensor:
    if dtype.is_floating_point and dtype.itemsize == 1 and x.dtype.itemsize > 1:
        if not saturate:
            return x.to(dtype)
        top = torch.finfo(dtype).max
        return torch.where(x.isnan(), x, x.float().clamp(-top, top)).to(dtype)
    return x.to(dtype)


def bit_cast(x: Tensor, *, to: int) -> Tensor:
    """BitCast: the same bits as another type of the same size."""
    return x.contiguous().view(torch_dtype(to))


def refuse_cast(_: ir.Node, attributes: Attributes) -> str | None:
    """Return why a cast is not handled, or None."""
    return _refused(ir.DataType(attributes["to"]), attributes)


def refuse_cast_like(node: ir.Node, attributes: Attributes) -> str | None:
    """Return why a CastLike is not handled, or None."""
    like = node.inputs[1]
    kind = None if like is None else like.dtype
    return None if kind is None else _refused(kind, attributes)


def _refused(kind: ir.DataType, attributes: Attributes) -> str | None:
    if kind not in TORCH:
        return f"torch has no element type {kind.name}"
    overflows = kind is ir.DataType.FLOAT8E4M3FN and not attributes.get("saturate", 1)
    return "torch saturates where FLOAT8E4M3FN overflows" if overflows else None


ROWS: Rows = {
    "BitCast": Row(bit_cast, refuses=refuse_cast),
    "Cast": Row(cast, on_host=host.cast, codes=(0,), refuses=refuse_cast),
    "CastLike": Row(cast_like, codes=(0,), refuses=refuse_cast_like),
    "ConstantOfShape": Row(
        constant_of_shape, host=(0,), on_host=host.constant_of_shape, creates=True, extras=(Extra.ANCHOR,)
    ),
    "EyeLike": Row(eye_like),
    "OneHot": Row(one_hot, host=(1,)),
    "Range": Row(range_, host=(0, 1, 2), on_host=host.range_, creates=True, extras=(Extra.ANCHOR,)),
    "Shape": Row(shape, gives_host=True),
    "Size": Row(size, gives_host=True),
    "Trilu": Row(trilu, host=(1,)),
}
