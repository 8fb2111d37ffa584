# SPDX-License-Identifier: Apache-2.0
"""Element types and tensors of ONNX in torch and back."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from splitfold.runtime.errors import UnsupportedError

__all__ = [
    "NARROW", "STORED", "TORCH", "array_tensor", "from_tensor", "integer_range", "is_carried", "to_array",
    "to_tensor", "torch_dtype",
]  # fmt: skip

TORCH = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.COMPLEX64: torch.complex64,
    ir.DataType.COMPLEX128: torch.complex128,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    ir.DataType.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
}
"""The torch type of an ONNX type that torch has."""

STORED = (ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64)
"""Types that torch stores and converts but does not compute with."""

NARROW = {
    ir.DataType.INT4: torch.int8,
    ir.DataType.UINT4: torch.uint8,
    ir.DataType.INT2: torch.int8,
    ir.DataType.UINT2: torch.uint8,
}
"""ONNX types of less than a byte, which torch lacks, and the type that their numbers are held in."""

_BITS = {1: np.uint8, 2: np.int16}


def is_carried(dtype: ir.DataType | None) -> bool:
    """Whether tensors of `dtype` can be held; an unknown type is taken to be one that can."""
    return dtype is None or dtype in TORCH or dtype in NARROW


def torch_dtype(number: int) -> torch.dtype:
    """Return the torch type of the ONNX type with this number.

    Raises:
        UnsupportedError: torch has none.
    """
    kind = ir.DataType(number)
    if kind not in TORCH:
        raise UnsupportedError(f"torch has no element type {kind.name}")
    return TORCH[kind]


def integer_range(kind: ir.DataType) -> tuple[int, int]:
    """Return the least and largest number of an integer type.

    Raises:
        UnsupportedError: it is no integer type.
    """
    if not kind.is_integer():
        raise UnsupportedError(f"quantization to {kind.name} is not handled, only to integers")
    if kind.is_signed():
        return -(2 ** (kind.bitwidth - 1)), 2 ** (kind.bitwidth - 1) - 1
    return 0, 2**kind.bitwidth - 1


def to_tensor(tensor: ir.TensorProtocol) -> torch.Tensor:
    """Return a copy of `tensor` in torch; numbers of less than a byte take a byte each.

    Raises:
        UnsupportedError: torch has no such element type.
    """
    kind = tensor.dtype
    if kind in NARROW:
        wide = np.int8 if NARROW[kind] is torch.int8 else np.uint8
        return torch.from_numpy(np.array(tensor.numpy().astype(wide), order="C"))
    if kind not in TORCH:
        raise UnsupportedError(f"the tensor '{tensor.name}' is {kind.name}, which torch has not")
    array = np.array(tensor.numpy(), order="C")
    if kind.is_floating_point() and array.dtype.kind not in "fc":  # a type of ml_dtypes
        return torch.from_numpy(array.view(_BITS[array.itemsize])).view(TORCH[kind])
    return torch.from_numpy(array)


def array_tensor(array: npt.NDArray[np.generic]) -> torch.Tensor:
    """Return an array, also one of a type that numpy lacks (of ml_dtypes), as a tensor of its own."""
    extended = array.dtype.type.__module__.startswith("ml_dtypes")
    return to_tensor(ir.tensor(array)) if extended else torch.from_numpy(np.array(array))


def to_array(tensor: torch.Tensor, kind: ir.DataType) -> npt.NDArray[np.generic]:
    """Return a copy of `tensor`, of the torch type of `kind`, as numpy holds `kind`."""
    held = tensor.detach().cpu().contiguous()
    if kind.is_floating_point() and kind.numpy().kind not in "fc":
        bits = torch.uint8 if held.element_size() == 1 else torch.int16
        return np.array(held.view(bits).numpy().view(kind.numpy()))
    return np.array(held.numpy())


def from_tensor(tensor: torch.Tensor, like: ir.TensorProtocol) -> ir.TensorProtocol:
    """Return `tensor` as an IR tensor with the name and element type of `like`."""
    return ir.Tensor(
        to_array(tensor, like.dtype), dtype=like.dtype, name=like.name, doc_string=like.doc_string
    )
