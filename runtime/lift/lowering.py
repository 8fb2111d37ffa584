# SPDX-License-Identifier: Apache-2.0
"""Trained weights, back into the ONNX model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir
import torch

from splitfold.runtime.lift.constants import constant_of
from splitfold.runtime.lift.dtypes import from_tensor, to_tensor
from splitfold.runtime.lift.lifted import Lifted

__all__ = ["lower_weights"]


def lower_weights(lifted: Lifted, model: ir.Model) -> bool:
    """Write the parameters of a lifted model into the initializers and constants of `model` that they were
    made from, which keep their names, shapes and element types; return whether any number changed.

    Buffers (integers, quantized codes) are left as they are.

    Raises:
        ValueError: the model has no constant, of this shape, for a parameter: the module was lifted from
            another one.
    """
    constants = dict(_constants(model.graph, ""))
    parameters = dict(lifted.module.named_parameters())
    if model.functions:  # constants of their bodies were inlined before the lift, under other names
        known = {key: name for key, name in lifted.parameters.items() if key in constants}
    else:
        known = dict(lifted.parameters)
    changed = False
    for key, name in known.items():
        if name in parameters:
            changed |= _write(key, parameters[name], constants.get(key))
    return changed


Place = tuple[ir.TensorProtocol, Callable[[ir.TensorProtocol], None]]
"""A constant, and what puts another one in its place."""


def _write(key: str, parameter: torch.Tensor, place: Place | None) -> bool:
    if place is None or tuple(place[0].shape.numpy()) != tuple(parameter.shape):
        raise ValueError(f"the model has no constant '{key}' of shape {list(parameter.shape)}.")
    tensor, put = place
    kept = to_tensor(tensor)
    trained = parameter.detach().cpu().to(kept.dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[kept.element_size()]
    if torch.equal(kept.view(bits), trained.contiguous().view(bits)):  # a NaN is equal to itself
        return False
    put(from_tensor(trained, tensor))
    return True


def _constants(graph: ir.Graph, key: str) -> Iterator[tuple[str, Place]]:
    for value in graph.initializers.values():
        if value.const_value is not None:
            yield f"{key}{value.name}", (value.const_value, _initializer_of(value))
    for node in graph:
        tensor = constant_of(node.outputs[0]) if node.op_type == "Constant" and node.outputs else None
        if tensor is not None:
            yield f"{key}{node.outputs[0].name}", (tensor, _attribute_of(node))
        for attribute in node.attributes.values():
            if attribute.type is ir.AttributeType.GRAPH:
                place = f"{key}{node.outputs[0].name}/{attribute.name}/"
                yield from _constants(attribute.as_graph(), place)


def _initializer_of(value: ir.Value) -> Callable[[ir.TensorProtocol], None]:
    def put(tensor: ir.TensorProtocol) -> None:
        value.const_value = tensor

    return put


def _attribute_of(node: ir.Node) -> Callable[[ir.TensorProtocol], None]:
    def put(tensor: ir.TensorProtocol) -> None:
        node.attributes.clear()  # value_floats and the like hold no shape
        node.attributes["value"] = ir.AttrTensor("value", tensor)

    return put
