# SPDX-License-Identifier: Apache-2.0
"""An ONNX model as a torch.fx module."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from splitfold.runtime.lift.builder import Build, GraphBuilder
from splitfold.runtime.lift.check import check_liftable
from splitfold.runtime.lift.lifted import Lifted

__all__ = ["lift"]


def lift(model: ir.Model) -> Lifted:
    """Lift a model into a `torch.fx.GraphModule`, in which gradients flow to inputs and weights.

    Float initializers become parameters (trainable where a node reads them as weights: of rank 1 or more and
    finite, no statistics of a batch norm and no scales of a quantizer), other constants buffers; names are
    kept. Shapes stay dynamic. Quantizers have straight-through gradients: rounding passes them on, saturation
    stops them (Bengio et al., arXiv:1308.3432). The model itself is left alone, and its arrays are copied.

    Args:
        model: a valid model of operators up to opset 28, and of com.microsoft; functions are inlined.

    Raises:
        UnsupportedError: it holds an operator, an attribute or an element type that is not handled. The
            message names the node and its layer; nothing was run.
    """
    if model.functions:
        model = model.clone()
        InlinePass()(model)
    check_liftable(model)
    build = Build(model.opset_imports, {})
    builder = GraphBuilder(model.graph, build)
    module = builder.module("LiftedModel")
    inputs = tuple(value.name or "" for value in model.graph.inputs if not value.is_initializer())
    outputs = tuple(value.name or "" for value in model.graph.outputs)
    return Lifted(module, inputs, outputs, builder.values.names, build.parameters)
