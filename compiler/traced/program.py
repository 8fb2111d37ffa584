# SPDX-License-Identifier: Apache-2.0
"""A module as torch.export traces it while it trains, and the same as an ONNX model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
import torch.fx
from torch import nn
from torch.export import ExportedProgram

from splitfold.compiler.capture import explain, quiet, translated
from splitfold.compiler.errors import CaptureError
from splitfold.compiler.traced.written_out import WrittenOut

__all__ = ["Program", "trace", "training_argument"]

_TRAINING = {
    torch.ops.aten.dropout.default: 2,
    torch.ops.aten.batch_norm.default: 5,
    torch.ops.aten.scaled_dot_product_attention.default: 4,
}
"""Operators that compute something else while they train, and the argument that tells whether they do."""
_BATCH_NORM = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Program:
    """A module as it trains, as a graph.

    Attributes:
        exported: its weights are those of `module`.
        module: a copy of the user's, in training mode.
    """

    exported: ExportedProgram
    module: nn.Module

    def onnx(self) -> tuple[ir.Model, dict[str, str]]:
        """Return the ONNX model of what it computes when it does not train, and for names of its values those
        of the nodes of the graph that compute them.

        Raises:
            CaptureError: torch.onnx cannot translate it.
        """
        fixed = copy.deepcopy(self.exported)
        for node in fixed.graph_module.graph.nodes:
            found = training_argument(node)
            if found is not None:
                at, value = found
                node.update_arg(at, False if isinstance(value, bool) else 0.0)
        made = translated(fixed)
        program = made.exported_program
        if program is None:
            raise CaptureError("torch.onnx.export does not say what it translated.")
        origins = _origins(program.graph_module.graph, {node.name for node in self.exported.graph.nodes})
        given = self.exported.graph_signature.user_inputs
        return made.model, {name: name for name in given if isinstance(name, str)} | origins


def training_argument(node: torch.fx.Node) -> tuple[int, Any] | None:
    """Return which argument of a node tells whether it trains, and its value; None where there is none."""
    at = _TRAINING.get(node.target) if node.op == "call_function" else None  # type: ignore[call-overload]
    return (at, node.args[at]) if at is not None and at < len(node.args) else None


def trace(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_shapes: object,
    *,
    written_out: bool,
) -> Program:
    """Trace a copy of a module in training mode, so that its dropouts are seen.

    Args:
        module: it is left alone.
        args, kwargs: example inputs.
        dynamic_shapes: as `torch.export.export` takes them.
        written_out: write each scaled_dot_product_attention as two products and a softmax.

    Raises:
        CaptureError: torch.export cannot trace it, or it draws random numbers other than by dropout.
    """
    held = copy.deepcopy(module).train()
    for name, part in held.named_modules():
        if isinstance(part, _BATCH_NORM):
            part.eval()  # else each forward would count batches, also when it does not train
            if part.momentum is None and part.track_running_stats:
                raise CaptureError(f"'{name}' averages all batches (momentum=None): give it a momentum.")
    try:
        with quiet(), torch.no_grad(), WrittenOut() if written_out else nullcontext():
            exported = torch.export.export(
                held,
                args,
                dict(kwargs),
                dynamic_shapes=dynamic_shapes,  # type: ignore[arg-type]
                strict=False,
            )
    except Exception as error:
        raise CaptureError(f"as it trains, {explain(held, error)}") from error
    _check_random(exported)
    return Program(exported, held)


def _check_random(program: ExportedProgram) -> None:
    for node in program.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags and node.target not in _TRAINING:
            stack = list((node.meta.get("nn_module_stack") or {"": ("", "")}).values())
            raise CaptureError(
                f"'{stack[-1][0] or 'the module'}' draws random numbers while it trains ({node.target}): "
                "only nn.Dropout, functional.dropout and the dropout of attention can be kept. Switch it off "
                "(drop path, layer drop, noise), or substitute in your own code."
            )


def _origins(graph: torch.fx.Graph, known: set[str]) -> dict[str, str]:
    """Return for each node of the decomposed graph the name of the node of the graph before that it computes:
    of several that one was made into, the last."""
    last: dict[str, str] = {}
    for node in graph.nodes:
        origin = _root(node.meta.get("from_node"))
        if node.op == "call_function" and origin in known:
            last[origin] = node.name
    return {name: origin for origin, name in last.items()}


def _root(sources: Any) -> str | None:
    found = None
    follow: Callable[[Any], Any] = lambda it: it[-1] if it else None  # noqa: E731
    source = follow(sources)
    while source is not None:
        found = source.name
        source = follow(source.from_node)
    return found
