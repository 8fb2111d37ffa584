# SPDX-License-Identifier: Apache-2.0
"""What keeps a model from being verified: operators without a kernel, and outputs that are random."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from splitfold.runtime.errors import SessionError
from splitfold.runtime.feeds import Feeds
from splitfold.runtime.session import Optimization, Session
from splitfold.runtime.target import Target

__all__ = ["missing_kernels", "random_outputs"]

_RANDOM = {
    "Bernoulli",
    "BiasDropout",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}


def missing_kernels(model: ir.Model, target: Target) -> str:
    """Return which custom operators keep the runtime from opening `model`; empty where none does."""
    custom = sorted(
        {
            f"{node.domain}::{node.op_type}"
            for graph in model.graphs()
            for node in graph
            if not target.supports(node) and node.op_identifier() not in model.functions
        }
    )
    if not custom:
        return ""
    try:
        Session(model, target, optimization=Optimization.OFF)
    except SessionError:
        return f"the runtime has no kernel for the custom operators {', '.join(custom)}"
    return ""


def random_outputs(model: ir.Model, feeds: Feeds, target: Target) -> str:
    """Return that two runs on the same feeds differ, by which random operators; empty where they do not."""
    graphs = [*model.graphs(), *model.functions.values()]
    found = sorted({node.op_type for graph in graphs for node in graph if node.op_type in _RANDOM})
    if not found:
        return ""
    session = Session(model, target, optimization=Optimization.OFF)
    first, second = session.run(feeds), session.run(feeds)
    same = all(
        np.array_equal(first[name], second[name], equal_nan=first[name].dtype.kind == "f") for name in first
    )
    return "" if same else f"its outputs are random ({', '.join(found)}): two runs on the same inputs differ"
