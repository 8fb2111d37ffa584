# SPDX-License-Identifier: Apache-2.0
"""Arithmetic, comparisons and logic, element by element with broadcasting (opset 7)."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from splitfold.runtime.lift import host
from splitfold.runtime.lift.row import Row, Rows

__all__ = ["ROWS", "clip"]


def divide(x: Tensor, y: Tensor) -> Tensor:
    """Div: integers are truncated towards zero."""
    return torch.div(x, y) if x.dtype.is_floating_point else torch.div(x, y, rounding_mode="trunc")


def power(x: Tensor, y: Tensor | float) -> Tensor:
    """Pow: the result is of the base's type."""
    found = torch.pow(x, y)
    return found if found.dtype is x.dtype else found.to(x.dtype)


def modulo(x: Tensor, y: Tensor, *, fmod: int = 0) -> Tensor:
    """Mod: of the divisor's sign, or with `fmod` of the dividend's."""
    return torch.fmod(x, y) if fmod else torch.remainder(x, y)


def smallest(*tensors: Tensor) -> Tensor:
    """Min of several tensors."""
    return functools.reduce(torch.minimum, tensors)


def largest(*tensors: Tensor) -> Tensor:
    """Max of several tensors."""
    return functools.reduce(torch.maximum, tensors)


def total(*tensors: Tensor) -> Tensor:
    """Sum of several tensors."""
    return functools.reduce(torch.add, tensors)


def mean(*tensors: Tensor) -> Tensor:
    """Mean of several tensors."""
    return functools.reduce(torch.add, tensors) / len(tensors)


def clip(
    x: Tensor, low: Any = None, high: Any = None, *, min: float | None = None, max: float | None = None
) -> Tensor:
    """Clip: bounds are attributes before opset 11, inputs from there on."""
    low, high = (min if low is None else low), (max if high is None else high)
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        x = x if low is None else torch.maximum(x, torch.as_tensor(low, dtype=x.dtype, device=x.device))
        return x if high is None else torch.minimum(x, torch.as_tensor(high, dtype=x.dtype, device=x.device))
    return x if low is None and high is None else torch.clamp(x, low, high)


def shift(x: Tensor, y: Tensor, *, direction: str) -> Tensor:
    """BitShift."""
    return torch.bitwise_left_shift(x, y) if direction == "LEFT" else torch.bitwise_right_shift(x, y)


def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """IsInf, of both signs or one."""
    if detect_negative and detect_positive:
        return torch.isinf(x)
    if detect_positive:
        return torch.isposinf(x)
    return torch.isneginf(x) if detect_negative else torch.zeros_like(x, dtype=torch.bool)


def cumulated(x: Tensor, axis: Any, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """CumSum: with `exclusive` an element does not count itself, with `reverse` it runs from the end."""
    return _running(torch.cumsum, x, int(axis), 0, exclusive, reverse)


def cumulated_product(x: Tensor, axis: Any, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """CumProd."""
    return _running(torch.cumprod, x, int(axis), 1, exclusive, reverse)


def _running(function: Any, x: Tensor, axis: int, neutral: int, exclusive: int, reverse: int) -> Tensor:
    x = x.flip(axis) if reverse else x
    if exclusive:
        first = torch.full_like(x.narrow(axis, 0, 1), neutral)
        x = torch.cat([first, x.narrow(axis, 0, x.shape[axis] - 1)], axis)
    found: Tensor = function(x, axis, dtype=x.dtype)
    return found.flip(axis) if reverse else found


ROWS: Rows = {
    "Abs": Row(torch.abs, on_host=np.abs),
    "Acos": Row(torch.acos),
    "Acosh": Row(torch.acosh),
    "Add": Row(torch.add, on_host=np.add, since=7),
    "And": Row(torch.logical_and, on_host=np.logical_and, since=7),
    "Asin": Row(torch.asin),
    "Asinh": Row(torch.asinh),
    "Atan": Row(torch.atan),
    "Atanh": Row(torch.atanh),
    "BitShift": Row(shift),
    "BitwiseAnd": Row(torch.bitwise_and),
    "BitwiseNot": Row(torch.bitwise_not),
    "BitwiseOr": Row(torch.bitwise_or),
    "BitwiseXor": Row(torch.bitwise_xor),
    "Ceil": Row(torch.ceil, on_host=np.ceil),
    "Clip": Row(clip, scalars=(1, 2)),
    "Cos": Row(torch.cos),
    "Cosh": Row(torch.cosh),
    "CumProd": Row(cumulated_product, host=(1,)),
    "CumSum": Row(cumulated, host=(1,)),
    "Div": Row(divide, on_host=host.divide, since=7),
    "Equal": Row(torch.eq, on_host=np.equal, since=7),
    "Erf": Row(torch.erf),
    "Exp": Row(torch.exp),
    "Floor": Row(torch.floor, on_host=np.floor),
    "Greater": Row(torch.gt, on_host=np.greater, since=7),
    "GreaterOrEqual": Row(torch.ge, on_host=np.greater_equal),
    "IsInf": Row(is_inf),
    "IsNaN": Row(torch.isnan),
    "Less": Row(torch.lt, on_host=np.less, since=7),
    "LessOrEqual": Row(torch.le, on_host=np.less_equal),
    "Log": Row(torch.log),
    "Max": Row(largest, on_host=host.largest),
    "Mean": Row(mean),
    "Min": Row(smallest, on_host=host.smallest),
    "Mod": Row(modulo, on_host=host.modulo),
    "Mul": Row(torch.mul, on_host=np.multiply, since=7),
    "Neg": Row(torch.neg, on_host=np.negative),
    "Not": Row(torch.logical_not, on_host=np.logical_not),
    "Or": Row(torch.logical_or, on_host=np.logical_or, since=7),
    "Pow": Row(power, scalars=(1,), since=7),
    "Reciprocal": Row(torch.reciprocal),
    "Round": Row(torch.round),
    "Sign": Row(torch.sign),
    "Sin": Row(torch.sin),
    "Sinh": Row(torch.sinh),
    "Sqrt": Row(torch.sqrt, on_host=np.sqrt),
    "Sub": Row(torch.sub, on_host=np.subtract, since=7),
    "Sum": Row(total),
    "Tan": Row(torch.tan),
    "Tanh": Row(torch.tanh),
    "Where": Row(torch.where, on_host=np.where),
    "Xor": Row(torch.logical_xor, since=7),
}
