# SPDX-License-Identifier: Apache-2.0
"""In which form a value is carried through a lifted graph, and the steps from one form to another."""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import torch

from splitfold.runtime.lift.dtypes import array_tensor

__all__ = ["Kind", "from_codes", "host_array", "integers", "to_host", "to_torch"]


class Kind(enum.Enum):
    """How a value is carried."""

    TENSOR = enum.auto()
    """A tensor of the ONNX type (or a list of tensors: a sequence)."""
    HOST = enum.auto()
    """A numpy array, or integers."""
    CODES = enum.auto()
    """A float tensor that holds the quantized numbers of an integer type, so that gradients pass."""


def to_host(value: torch.Tensor) -> Any:
    """Return a tensor as a numpy array."""
    held = value.detach().cpu()
    return (held.float() if held.dtype is torch.bfloat16 else held).numpy()


def to_torch(value: Any, anchor: torch.Tensor) -> torch.Tensor:
    """Return numbers of the host as a tensor on the device of `anchor`."""
    return array_tensor(np.asarray(value)).to(anchor.device)


def from_codes(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return quantized numbers as the integers that they are; no gradient passes."""
    return value.detach().to(dtype)


def host_array(values: Any, dtype: str) -> Any:
    """Return constant numbers of the host, of the numpy type of this name."""
    return np.array(values, dtype)


def integers(numbers: Any) -> list[int]:
    """Return numbers of the host as a list of Python integers."""
    if isinstance(numbers, np.ndarray | np.generic):
        return np.asarray(numbers).reshape(-1).tolist()
    return list(numbers) if isinstance(numbers, tuple | list) else [int(numbers)]
