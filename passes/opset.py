# SPDX-License-Identifier: Apache-2.0
"""Raising a model's opset, with the converters of onnxscript (opset 18 and newer) and of onnx (older)."""

from __future__ import annotations

import logging

import onnx
import onnx.version_converter
import onnx_ir as ir
from onnx_ir.passes.common import _c_api_utils
from onnxscript import version_converter

from splitfold.runtime.errors import UnsupportedError

__all__ = ["OLDEST_OPSET", "default_opset", "raise_opset"]

OLDEST_OPSET = 7
"""Older models are refused: ONNX Runtime guarantees nothing below opset 7."""
_WORKING_OPSET = 13
"""QuantizeLinear has an axis, and Softmax and Squeeze their present meaning, from here on."""
_NORM_OPSET = 17
"""ONNX has LayerNormalization from here on."""

_HIDDEN = "splitfold.unknown"

logger = logging.getLogger(__name__)


def default_opset(model: ir.Model) -> int:
    """Return the version of the default ONNX domain that the model imports."""
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    return int(version) if version is not None else 0


def working_opset(model: ir.Model) -> int:
    """Return the oldest opset in which the model is valid and that passes work with.

    ONNX Runtime has LayerNormalization from opset 1 on, ONNX from 17: older exports of transformers use it.
    """
    newer = any(
        node.op_type == "LayerNormalization" and node.domain == "" for node in model.graph.all_nodes()
    )
    return _NORM_OPSET if newer else _WORKING_OPSET


def raise_opset(model: ir.Model, opset: int | None = None) -> str | None:
    """Raise the default opset to `opset` (the working one) in place where it is lower; return None, or the
    reason why it stayed.

    Raises:
        UnsupportedError: the model is older than opset 7 and cannot be converted.
    """
    present = default_opset(model)
    opset = working_opset(model) if opset is None else opset
    if present == 0 or present >= opset:
        return None
    reason = _convert(model, opset, present)
    if reason is not None and present < OLDEST_OPSET:
        raise UnsupportedError(
            f"the model has opset {present}, older than {OLDEST_OPSET}, and cannot be converted: {reason}"
        )
    return reason


def _convert(model: ir.Model, opset: int, present: int) -> str | None:
    if present < 9 and any(node.op_type == "Scan" for node in model.graph.all_nodes()):
        return (
            f"opset {present} could not be raised to {opset}: "
            "Scan has a batch axis before opset 9, which no converter handles"
        )
    trial = model.clone()
    try:
        if present >= 18:
            version_converter.convert_version(trial, opset, fallback=False)
        else:
            _convert_with_onnx(trial, opset)
    except Exception as error:
        lines = str(error).strip().splitlines()
        cause = lines[0][:200] if lines else type(error).__name__
        return f"opset {present} could not be raised to {opset}: {cause}"
    if default_opset(trial) < opset:
        return (
            f"opset {present} could not be raised to {opset}: the converter left it at {default_opset(trial)}"
        )
    _carry_identity(model, trial)
    _adopt(model, trial)
    logger.info("opset raised from %d to %d", present, opset)
    return None


def _convert_with_onnx(model: ir.Model, opset: int) -> None:
    def convert(proto: onnx.ModelProto) -> onnx.ModelProto:
        return onnx.version_converter.convert_version(proto, opset)

    _move_unknown(model)
    converted = ir.from_proto(_c_api_utils.call_onnx_api(convert, model))
    _move_back(converted)
    for name, value in converted.graph.initializers.items():
        held = model.graph.initializers.get(name)
        if value.const_value is None and held is not None:
            value.const_value = held.const_value
    for value in [v for v in converted.graph.inputs if v.name in model.graph.initializers]:
        tensor = model.graph.initializers[value.name or ""].const_value
        converted.graph.inputs.remove(value)
        value.const_value = tensor
        converted.graph.register_initializer(value)
    _adopt(model, converted)


def _move_unknown(model: ir.Model) -> None:
    """Hide operators that the runtime has in this opset and ONNX has not: the converter stops at them, while
    it passes other domains by.
    """
    present = default_opset(model)
    unknown = [node for node in model.graph.all_nodes() if node.domain == "" and not _has(node, present)]
    for node in unknown:
        node.domain = _HIDDEN
    if unknown:
        model.graph.opset_imports[_HIDDEN] = 1


def _move_back(model: ir.Model) -> None:
    for node in model.graph.all_nodes():
        if node.domain == _HIDDEN:
            node.domain = ""
    model.graph.opset_imports.pop(_HIDDEN, None)


def _has(node: ir.Node, opset: int) -> bool:
    return bool(onnx.defs.has(node.op_type, opset, ""))


def _carry_identity(old: ir.Model, new: ir.Model) -> None:
    """Give converted nodes the names and metadata of those that made the same values: the converter of onnx
    drops them."""
    makers = {value.name: node for node in old.graph.all_nodes() for value in node.outputs if value.name}
    for node in new.graph.all_nodes():
        maker = next((makers[value.name] for value in node.outputs if value.name in makers), None)
        if maker is not None:
            node.name = node.name or maker.name
            node.metadata_props.update({**maker.metadata_props, **node.metadata_props})


def _adopt(model: ir.Model, other: ir.Model) -> None:
    model.graph = other.graph
    model.ir_version = max(model.ir_version, other.ir_version)
