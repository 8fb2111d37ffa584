# SPDX-License-Identifier: Apache-2.0
"""Types and shapes of all values, inferred by onnx."""

from __future__ import annotations

import logging

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import _c_api_utils

__all__ = ["infer_shapes"]

logger = logging.getLogger(__name__)


def infer_shapes(model: ir.Model) -> None:
    """Infer types and shapes in place; where onnx cannot, or an operator contradicts what is declared, the
    model stays as it is.

    The pass of onnx-ir of this name turns the type of a sequence into that of a tensor.
    """

    def infer(proto: onnx.ModelProto) -> onnx.ModelProto:
        return onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=True)

    try:
        inferred = ir.from_proto(_c_api_utils.call_onnx_api(infer, model))
    except Exception as error:
        logger.info("shapes are not inferred: %s", error)
        return
    for graph, other in zip(model.graphs(), inferred.graphs(), strict=True):
        found = ir.convenience.create_value_mapping(other)
        for name, value in ir.convenience.create_value_mapping(graph).items():
            if name in found:
                _adopt(value, found[name])


def _adopt(value: ir.Value, inferred: ir.Value) -> None:
    if inferred.type is not None and value.const_value is None:
        value.type = inferred.type
    if inferred.shape is not None and value.const_value is None:
        value.shape = inferred.shape
