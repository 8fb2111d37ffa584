# SPDX-License-Identifier: Apache-2.0
"""Models to compare, and the parts of a difference, for the tests of `diff`."""

from __future__ import annotations

import onnx
import onnx_ir as ir
from seeded import parse_graph
from small import samples

from splitfold.compiler import Tolerance, compile
from splitfold.compiler.debug.diff.graph_diff import GraphDiff, diff
from splitfold.compiler.debug.diff.types import Kind, LayerChange, TensorChange

CALIBRATION = [{"x": samples(16, seed=seed)} for seed in range(4)]
HEAD = '<ir_version: 9, opset_import: ["" : 20]>'


def parsed_model(text: str) -> ir.Model:
    return ir.from_proto(parse_graph(f"{HEAD} {text}"))


def difference(before: str, after: str) -> GraphDiff:
    return diff(parsed_model(before), parsed_model(after))


def only_layer(found: GraphDiff) -> LayerChange:
    (layer,) = found.layers
    return layer


def only_tensor(found: GraphDiff, layer: str | None = None) -> TensorChange:
    (change,) = [
        change
        for group in found.layers
        if layer in (None, group.layer)
        for change in group.tensors
        if change.before is not None and change.after is not None and change.role != "bias"
    ]
    return change


def operators_of(found: GraphDiff, layer: str, kind: Kind) -> list[tuple[list[str], list[str]]]:
    changes = next(group for group in found.layers if group.layer == layer).nodes
    return [
        ([node.operator for node in change.before], [node.operator for node in change.after])
        for change in changes
        if change.kind is kind
    ]


def compiled(model: onnx.ModelProto, pipeline: str) -> ir.Model:
    free = Tolerance(cosine=None)
    return compile(model, CALIBRATION[0], pipeline=pipeline, calibration=CALIBRATION, tolerance=free).model
