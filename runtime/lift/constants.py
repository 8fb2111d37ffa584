# SPDX-License-Identifier: Apache-2.0
"""Constants of a graph: which values are constant, which are weights to train, and their names."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import torch

from splitfold.runtime.errors import UnsupportedError

__all__ = ["constant_of", "is_small_integer", "register", "trainable"]

_SMALL = 64
"""Elements up to which an integer constant is taken for a shape, axes, or the like."""
_UNQUOTED = re.compile(r'["\\\s]')


def constant_of(value: ir.Value) -> ir.TensorProtocol | None:
    """Return the tensor of an initializer or of a Constant node, else None.

    An initializer that is also a graph input is a constant: a caller cannot override it in a lifted model.

    Raises:
        UnsupportedError: a constant of strings, or a sparse one.
    """
    if value.is_initializer() and value.const_value is not None:
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    (attribute,) = node.attributes.values()
    if attribute.name == "value":
        return attribute.as_tensor()
    if attribute.name in ("value_int", "value_ints"):
        return ir.tensor(np.array(attribute.value, np.int64), name=value.name)
    if attribute.name in ("value_float", "value_floats"):
        return ir.tensor(np.array(attribute.value, np.float32), name=value.name)
    raise UnsupportedError(f"the constant '{value.name}' is a {attribute.name}, which torch has not")


def is_small_integer(tensor: ir.TensorProtocol) -> bool:
    """Whether a constant may be numbers of the host: few integers or booleans."""
    integer = tensor.dtype.is_integer() and tensor.dtype.bitwidth >= 8
    return (integer or tensor.dtype is ir.DataType.BOOL) and tensor.size <= _SMALL


def trainable(value: ir.Value, tensor: ir.TensorProtocol, fixed: Callable[[ir.Node, int], bool]) -> bool:
    """Whether a constant is taken for a weight to train.

    It is an initializer of a float type and of rank 1 or more, finite (a mask is not), and some node reads it
    as a weight, not as a statistic or as a quantizer's scale.
    """
    if not value.is_initializer() or not tensor.dtype.is_floating_point() or not len(tensor.shape):
        return False
    if all(fixed(use.node, use.idx) for use in value.uses()):
        return False
    array = tensor.numpy()
    return bool(np.isfinite(array if array.dtype.kind == "f" else array.astype(np.float32)).all())


def register(root: torch.nn.Module, name: str, tensor: torch.Tensor | torch.nn.Module) -> str:
    """Hold `tensor` in `root` under `name`, dots being submodules, and return the name that it really got."""
    parts = [_UNQUOTED.sub("_", part) for part in name.split(".")]
    owner = _owner(root, parts)
    if owner is None:  # a prefix of the name is a tensor, or a part of it is taken or empty
        flat = "_".join(part for part in parts if part) or "constant"
        parts = [flat]
        while _taken(root, parts[0]):
            parts = [f"{parts[0]}_"]
        owner = root
    if isinstance(tensor, torch.nn.Module):
        owner.add_module(parts[-1], tensor)
    elif isinstance(tensor, torch.nn.Parameter):
        owner.register_parameter(parts[-1], tensor)
    else:
        owner.register_buffer(parts[-1], tensor)
    return ".".join(parts)


def _owner(root: torch.nn.Module, parts: list[str]) -> torch.nn.Module | None:
    """Return the submodule that is to hold the last part, made where it is missing."""
    module = root
    for part in parts[:-1]:
        present = module._modules.get(part)
        if present is None and (not part or _taken(module, part)):
            return None
        if present is None:
            present = torch.nn.Module()
            module.add_module(part, present)
        module = present
    return None if not parts[-1] or _taken(module, parts[-1]) else module


def _taken(module: torch.nn.Module, name: str) -> bool:
    return hasattr(module, name) or hasattr(torch.fx.GraphModule, name)
