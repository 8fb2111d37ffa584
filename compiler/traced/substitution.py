# SPDX-License-Identifier: Apache-2.0
"""Passes that are trained with, on a torch module: rewrite its ONNX form, and put what is new into its
trace."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.fx
from torch import Tensor, nn
from torch.utils import _pytree

from splitfold.compiler.capture import is_torch_model, split_inputs
from splitfold.compiler.errors import CaptureError, SubstitutionError
from splitfold.compiler.traced.graft import Rewrite, graft, rewritten
from splitfold.compiler.traced.module import trainable
from splitfold.compiler.traced.program import trace
from splitfold.compiler.traced.written_out import guarded_softmaxes
from splitfold.passes.base import Pass
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.pipeline import PassRecord, Pipeline
from splitfold.runtime.compare import deviation
from splitfold.runtime.session import Optimization, Session
from splitfold.runtime.target import Target

__all__ = ["substituted"]

_LIMIT = 1e-3
"""Relative L2 distance of outputs that are the same in float32."""
_SHOWN = 4


def substituted(
    module: nn.Module, steps: Sequence[Pass], example_inputs: object, dynamic_shapes: object
) -> tuple[torch.fx.GraphModule, Sequence[PassRecord]]:
    """Return the module with what the passes add, and what they say they did; see
    `splitfold.compiler.substitute`."""
    if not isinstance(module, nn.Module) or not is_torch_model(module):
        raise CaptureError(f"substitute takes a torch module, not {type(module).__name__}.")
    args, kwargs = split_inputs(example_inputs)
    made, rewrite, origins = _rewritten(module, steps, (args, kwargs), dynamic_shapes)
    for addition in rewrite.additions:
        graft(made, addition, origins)
    guarded_softmaxes(made.graph)
    made.graph.eliminate_dead_code()
    made.graph.lint()
    made.recompile()
    _check_rewritten(made, rewrite, args, kwargs)
    return made.train(module.training), rewrite.records


def _rewritten(
    module: nn.Module,
    steps: Sequence[Pass],
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    dynamic_shapes: object,
) -> tuple[torch.fx.GraphModule, Rewrite, Mapping[str, str]]:
    """Trace, and run the passes; with attention written out where they reach into torch's one function."""
    lost: set[str] = set()
    for written_out in (False, True):
        program = trace(module, *inputs, dynamic_shapes, written_out=written_out)
        made = trainable(program)
        _check_same(module, made, *inputs)
        model, origins = program.onnx()
        CanonicalizePass()(model)
        rewrite = rewritten(model, Pipeline.of(*steps))
        lost = rewrite.values - set(origins)
        if not lost:
            _check_applied(rewrite)
            return made, rewrite, origins
    raise SubstitutionError(
        f"what the passes rewrite has no counterpart in the trace of {type(module).__name__}: "
        f"{', '.join(sorted(lost)[:_SHOWN])}. Substitute in the ONNX model, and train it with finetune."
    )


def _check_applied(rewrite: Rewrite) -> None:
    if rewrite.additions:
        return
    reasons = [f"{layer}: {reason}" for record in rewrite.records for layer, reason in record.skipped]
    reasons += [f"{layer}: {reason}" for record in rewrite.records for layer, _, reason in record.missed]
    why = "; ".join(reasons[:_SHOWN]) or "it has no attention"
    raise SubstitutionError(f"nothing was substituted: {why}.")


def _check_same(
    module: nn.Module, made: torch.fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Raise `CaptureError` where the trace of the training module is another function than the module."""
    found = deviation(_arrays(copy.deepcopy(module), args, kwargs), _arrays(made, args, kwargs))
    if not found.relative <= _LIMIT:
        raise CaptureError(
            f"{type(module).__name__} computes something else while it trains, also without dropout "
            f"({found}): 'self.training' decides more than that."
        )


def _check_rewritten(
    made: torch.fx.GraphModule, rewrite: Rewrite, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Raise `SubstitutionError` where the module and the rewritten ONNX model differ."""
    names = [value.name or "" for value in rewrite.model.graph.inputs]
    tensors = [leaf for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    by_name = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
    feeds = by_name if set(names) == set(by_name) else dict(zip(names, tensors, strict=True))
    session = Session(rewrite.model, Target.cpu(), optimization=Optimization.OFF)
    expected = session.run({name: feeds[name].detach().cpu().numpy() for name in names})
    found = deviation(list(expected.values()), _arrays(made, args, kwargs)[: len(expected)])
    if not found.relative <= _LIMIT:
        raise SubstitutionError(f"the module is not what the passes made of the ONNX model: {found}.")


def _arrays(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[np.ndarray]:
    """Return the outputs of a module that does not train."""
    mode = module.training
    module.eval()
    with torch.no_grad():
        leaves = _pytree.tree_leaves(module(*args, **kwargs))
    module.train(mode)
    return [leaf.detach().cpu().numpy() for leaf in leaves if isinstance(leaf, Tensor)]
