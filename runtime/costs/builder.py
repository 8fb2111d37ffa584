# SPDX-License-Identifier: Apache-2.0
"""A small model of one operation, built node by node, with the feeds to run it on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from splitfold.runtime.feeds import Array, Feeds

__all__ = ["MICROSOFT", "Builder", "Built"]

MICROSOFT = "com.microsoft"
_OPSET, _IR_VERSION = 21, 10


@dataclass(frozen=True)
class Built:
    """A model and what it is run on."""

    model: ir.Model
    feeds: Feeds


@dataclass
class Builder:
    """Collects inputs, constants and nodes.

    Args:
        opset: of the default domain.
    """

    opset: int = _OPSET
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    _inputs: list[ir.Value] = field(default_factory=list)
    _constants: list[ir.Value] = field(default_factory=list)
    _nodes: list[ir.Node] = field(default_factory=list)
    _feeds: dict[str, Array] = field(default_factory=dict)

    def normal(self, *shape: int) -> Array:
        """Return random float32 values."""
        return self.rng.standard_normal(shape, np.float32)

    def input(self, array: Array) -> ir.Value:
        """Return an input that is fed `array`."""
        kind = ir.DataType.from_numpy(array.dtype)
        value = ir.val(f"input_{len(self._inputs)}", dtype=kind, shape=ir.Shape(array.shape))
        self._inputs.append(value)
        self._feeds[value.name or ""] = array
        return value

    def constant(self, array: Array | ir.TensorProtocol) -> ir.Value:
        """Return an initializer."""
        tensor = ir.tensor(array) if isinstance(array, np.ndarray | np.generic) else array
        name, array_shape = f"constant_{len(self._constants)}", [int(size) for size in tensor.numpy().shape]
        value = ir.Value(
            name=name, shape=ir.Shape(array_shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self._constants.append(value)
        return value

    def add(
        self,
        operator: str,
        *inputs: ir.Value | None,
        domain: str = "",
        outputs: int = 1,
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """Add a node, and return its outputs."""
        node = ir.node(operator, list(inputs), attributes, domain=domain, num_outputs=outputs)
        for at, value in enumerate(node.outputs):
            value.name = f"value_{len(self._nodes)}_{at}"
        self._nodes.append(node)
        return tuple(node.outputs)

    def one(
        self,
        operator: str,
        *inputs: ir.Value | None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Add a node of one output, and return it."""
        return self.add(operator, *inputs, domain=domain, **attributes)[0]

    def built(self, output: ir.Value, kind: ir.DataType = ir.DataType.FLOAT) -> Built:
        """Return the model that gives `output`, of element type `kind`."""
        output.type = ir.TensorType(kind)
        graph = ir.Graph(
            self._inputs,
            [output],
            nodes=self._nodes,
            initializers=self._constants,
            opset_imports={"": self.opset, MICROSOFT: 1},
            name="kernel",
        )
        return Built(ir.Model(graph, ir_version=_IR_VERSION), self._feeds)
