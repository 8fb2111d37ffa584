# SPDX-License-Identifier: Apache-2.0
"""The operator table: all rows, by domain and operator type."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping

import onnx_ir as ir

from splitfold.runtime.lift.row import Row, Rows
from splitfold.runtime.lift.rows import (
    activation,
    attention,
    control,
    conv,
    elementwise,
    fused,
    fused_attention,
    indexing,
    integer,
    linear,
    loss,
    low_bit,
    moving,
    norm,
    pool,
    quantize,
    quantized_ops,
    recurrent,
    reduce,
    resize,
    sampling,
    scatter,
    sequence,
    shape,
    signal,
)

__all__ = ["NEWEST_OPSET", "ROWS", "find_row", "operator_name"]

NEWEST_OPSET = 28
"""The newest opset of the default domain that the rows were written for."""

_ONNX: Rows = ChainMap(
    {},
    *(
        dict(family.ROWS)
        for family in (
            activation, attention, control, conv, elementwise, indexing, integer, linear, loss, moving, norm,
            pool, quantize, recurrent, reduce, resize, sampling, scatter, sequence, shape, signal,
        )
    ),
)  # fmt: skip
_MICROSOFT: Rows = ChainMap(
    {}, dict(fused.ROWS), dict(fused_attention.ROWS), dict(low_bit.ROWS), dict(quantized_ops.ROWS)
)

ROWS: Mapping[str, Rows] = {"": _ONNX, "ai.onnx": _ONNX, "com.microsoft": _MICROSOFT}
"""Rows by domain and operator type."""


def find_row(node: ir.Node, opsets: Mapping[str, int]) -> Row | None:
    """Return the row of a node in a model that imports `opsets`, or None."""
    row = ROWS.get(node.domain, {}).get(node.op_type)
    if row is None and node.domain in ("", "ai.onnx"):  # the runtime has a few of its own in this domain
        row = fused.RUNTIME_ROWS.get(node.op_type)
    version = node.version if node.version is not None else opsets.get(node.domain)
    return None if row is None else row.at(version if version is not None else NEWEST_OPSET)


def operator_name(node: ir.Node) -> str:
    """Return an operator with its domain, where that is not ONNX's own: ``com.microsoft::MatMulNBits``."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
