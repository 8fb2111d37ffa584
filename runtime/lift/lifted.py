# SPDX-License-Identifier: Apache-2.0
"""A lifted model: its module, and where values and weights of the ONNX model are in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.fx

from splitfold.runtime.lift.dtypes import array_tensor

__all__ = ["ORIGIN", "VALUE", "Lifted", "Origin"]

ORIGIN = "onnx"
"""Key of `torch.fx.Node.meta` under which the `Origin` of a node stands; inputs and weights have none."""
VALUE = "onnx_value"
"""Key of `torch.fx.Node.meta` under which the name of the ONNX value stands that the node computes."""


@dataclass(frozen=True)
class Origin:
    """The ONNX node that a node of the lifted graph computes, or helps to."""

    name: str
    op_type: str
    domain: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Metadata of the ONNX node: after the canonical form, ``splitfold.layers`` is a JSON list of layers."""


@dataclass(frozen=True)
class Lifted:
    """An ONNX model as a `torch.fx.GraphModule`.

    It can be copied but not pickled (torch.fx would trace it again): keep the ONNX model, with
    `lower_weights`.

    Args:
        module: takes the model's inputs (those without an initializer) by position and returns a tuple of its
            outputs. Each operator is one ``call_function`` node on a plain function, outputs of an operator
            with several are ``getitem`` nodes, weights are ``get_attr`` nodes. Numbers that only make shapes
            are computed on the host, by numpy, and those known beforehand are written into the calls.
        inputs: names of the inputs, in order.
        outputs: names of the outputs, in order.
        values: name of the node of the top-level graph by name of the ONNX value; constants that were written
            into calls have none.
        parameters: name of the parameter (a float) or buffer (anything else) by name of the initializer or of
            the Constant node's output; inside of a subgraph, after ``<node's first output>/<attribute>/``.
    """

    module: torch.fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    values: Mapping[str, str]
    parameters: Mapping[str, str]

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run the module on numpy arrays or tensors by name; return its outputs, torch tensors, by name."""
        return dict(zip(self.outputs, self.module(*self.arguments(feeds)), strict=True))

    def record(self, feeds: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
        """Run the module node by node and return the values of these ONNX names, with their gradients' graph.

        Raises:
            KeyError: there is no such value at the top level, or it is a constant.
        """
        recorder = _Recorder(self.module, {self.values[name]: name for name in names})
        recorder.run(*self.arguments(feeds))
        return recorder.found

    def arguments(self, feeds: Mapping[str, Any]) -> list[Any]:
        """Return arrays or tensors by name as the tensors that the module takes, in order."""
        return [_tensor(feeds[name]) for name in self.inputs]


class _Recorder(torch.fx.Interpreter):
    def __init__(self, module: torch.fx.GraphModule, wanted: Mapping[str, str]) -> None:
        super().__init__(module)
        self._wanted = wanted
        self.found: dict[str, Any] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self._wanted:
            self.found[self._wanted[n.name]] = result
        return result


def _tensor(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, list):
        return [_tensor(item) for item in value]
    return array_tensor(np.asarray(value))
