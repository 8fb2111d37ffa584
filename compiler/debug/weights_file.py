# SPDX-License-Identifier: Apache-2.0
"""A file of weights that several models share: each distinct tensor stands in it once."""

from __future__ import annotations

import hashlib
import weakref
from pathlib import Path

import onnx_ir as ir

__all__ = ["WeightsFile"]

_SMALL = 1024
"""Bytes below which a tensor stays in the model's own file: shapes, scalars, biases."""
_ALIGNMENT = 64


class WeightsFile:
    """The external data of models that lie in the same folder; tensors are only ever appended.

    Args:
        path: the file; it is made by the first tensor.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._end = 0
        self._by_identity: dict[int, tuple[weakref.ref[ir.TensorProtocol], int]] = {}
        self._by_content: dict[bytes, int] = {}

    def apart(self, model: ir.Model) -> ir.Model:
        """Return a copy of `model` whose larger weights stand in this file; `model` is not changed.

        Raises:
            OSError: the file cannot be written.
        """
        copy = model.clone()
        for graph in copy.graphs():
            for value in graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.dtype is ir.DataType.STRING or tensor.nbytes < _SMALL:
                    continue
                value.const_value = ir.ExternalTensor(
                    self._path.name,
                    self._place(tensor),
                    tensor.nbytes,
                    tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()),
                    name=value.name or "",
                )
        return copy

    def _place(self, tensor: ir.TensorProtocol) -> int:
        """Return where the bytes of `tensor` start, after writing them where they are new."""
        known = self._by_identity.get(id(tensor))
        if known is not None and known[0]() is tensor:  # the number of a tensor that is gone is used again
            return known[1]
        content = tensor.tobytes()
        digest = hashlib.sha256(content).digest()
        if digest not in self._by_content:
            self._by_content[digest] = self._append(content)
        start = self._by_content[digest]
        self._by_identity[id(tensor)] = (weakref.ref(tensor), start)
        return start

    def _append(self, content: bytes) -> int:
        start = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        with self._path.open("ab") as file:
            file.write(bytes(start - self._end))
            file.write(content)
        self._end = start + len(content)
        return start
