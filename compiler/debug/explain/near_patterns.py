# SPDX-License-Identifier: Apache-2.0
"""Operators that together are one that the runtime has a kernel for: where it fuses them, and where they
nearly fit and what is in the way.

The patterns are those that ONNX Runtime was seen to fuse (1.31); the closest partial match is onnxscript's,
and whether the runtime fuses a place is read from its own graph.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from splitfold.runtime.errors import SessionError
from splitfold.runtime.session import optimized_graph
from splitfold.runtime.target import Target

__all__ = ["PatternFit", "pattern_fits"]

_LEAST_SHARE = 0.7
"""Share of a pattern's operators that must be there for the rest to be worth a word."""


@dataclass(frozen=True)
class PatternFit:
    """A place where a pattern fits, or nearly does.

    Attributes:
        pattern: what the operators compute together.
        kernel: what the runtime fuses them to.
        nodes: those that fit, the last one first.
        missing: what differs from the pattern; empty where nothing does.
        end: the node at which it differs, where there is one.
        fused: whether the runtime fuses it.
    """

    pattern: str
    kernel: str
    nodes: tuple[ir.Node, ...]
    missing: str
    end: ir.Node | None = None
    fused: bool = False

    def __str__(self) -> str:
        count = f"{len(self.nodes)} operators"
        if self.fused:
            return f"{count} compute a {self.pattern}, which the runtime fuses to {self.kernel}"
        if not self.missing:
            return f"{count} compute a {self.pattern}, which the runtime does not fuse to {self.kernel} here"
        kernel = f"which the runtime would fuse to {self.kernel}"
        return f"{count} are nearly a {self.pattern}, {kernel}: {self.missing}"


@dataclass(frozen=True)
class _Form:
    """One way to write a computation that the runtime fuses: a function that builds the pattern, and how many
    operators it has."""

    build: Callable[..., Any]
    operators: int


@dataclass(frozen=True)
class _Family:
    """A computation, the kernel that it is fused to, an operator without which the rest says nothing, and its
    forms."""

    pattern: str
    kernel: str
    telling: str
    forms: tuple[_Form, ...]


def _mean(op: Any, value: Any) -> Any:
    return op.ReduceMean(value, _allow_other_inputs=True)


def _rms_div(op: Any, x: Any, scale: Any, epsilon: Any) -> Any:
    return op.Mul(op.Div(x, op.Sqrt(op.Add(_mean(op, op.Pow(x, 2.0)), epsilon))), scale)


def _rms_inverse(op: Any, x: Any, scale: Any, epsilon: Any) -> Any:
    inverse = op.Div(1.0, op.Sqrt(op.Add(_mean(op, op.Pow(x, 2.0)), epsilon)))
    return op.Mul(op.Mul(x, inverse), scale)


def _layer_norm(op: Any, x: Any, scale: Any, bias: Any, epsilon: Any) -> Any:
    centred = op.Sub(x, _mean(op, x))
    root = op.Sqrt(op.Add(_mean(op, op.Pow(centred, 2.0)), epsilon))
    return op.Add(op.Mul(op.Div(centred, root), scale), bias)


def _gelu_late(op: Any, x: Any) -> Any:
    return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, 1.4142135)), 1.0)), 0.5)


def _gelu_early(op: Any, x: Any) -> Any:
    return op.Mul(op.Mul(x, 0.5), op.Add(op.Erf(op.Div(x, 1.4142135)), 1.0))


_FAMILIES = (
    _Family("layer normalization", "LayerNormalization", "ReduceMean", (_Form(_layer_norm, 9),)),
    _Family(
        "RMS normalization",
        "SimplifiedLayerNormalization",
        "ReduceMean",
        (_Form(_rms_div, 6), _Form(_rms_inverse, 7)),
    ),
    _Family("Gelu by erf", "Gelu", "Erf", (_Form(_gelu_late, 5), _Form(_gelu_early, 5))),
)


def pattern_fits(model: ir.Model, target: Target) -> list[PatternFit]:
    """Return the places of the main graph where a pattern fits or nearly does, in order; no node is in two.

    The model is opened where there are any, to see what the runtime makes of them.
    """
    order = {node: position for position, node in enumerate(model.graph)}
    present = {node.op_type for node in model.graph}
    taken: set[ir.Node] = set()
    found = []
    for family in (family for family in _FAMILIES if family.telling in present):
        matches = list(_matches(model, family))
        for _, fit in sorted(matches, key=lambda item: (-item[0], order[item[1].nodes[0]])):
            if taken.isdisjoint(fit.nodes):
                taken.update(fit.nodes)
                found.append(fit)
    return _as_run(model, sorted(found, key=lambda fit: order[fit.nodes[0]]), target)


def _as_run(model: ir.Model, fits: list[PatternFit], target: Target) -> list[PatternFit]:
    """Return `fits` with whether the runtime fuses them; a near miss that it fuses all the same is none."""
    if not fits:
        return []
    try:
        optimized = optimized_graph(model, target)
    except SessionError:
        return []
    kernels = {value.name: node.op_type for node in optimized.graph for value in node.outputs}
    fused = [fit.kernel in kernels.get(fit.nodes[0].outputs[0].name, "") for fit in fits]
    marked = [dataclasses.replace(fit, fused=done) for fit, done in zip(fits, fused, strict=True)]
    return [fit for fit in marked if not (fit.fused and fit.missing)]


def _matches(model: ir.Model, family: _Family) -> Iterator[tuple[float, PatternFit]]:
    """Yield (share of the pattern's operators that fit, place) of each close match."""
    roots = [node for node in model.graph if node.op_type in ("Add", "Mul")]
    for form in family.forms:
        rule = pattern.RewriteRule(form.build, _no_replacement, name=family.pattern)
        for variant, node in itertools.product(rule.commute(), roots):
            tracer = pattern.MatchingTracer()
            variant.match(model, model.graph, node, check_nodes_are_removable=False, tracer=tracer)
            for info in itertools.chain.from_iterable(tracer.best_matches_map.values()):
                nodes = tuple(dict.fromkeys(info.match_result.nodes))
                share = len(nodes) / form.operators
                if share >= _LEAST_SHARE and any(item.op_type == family.telling for item in nodes):
                    fits = info.status is pattern.MatchStatus.SUCCESS
                    yield share + fits, _fit(family, nodes, None if fits else info.match_result)


def _fit(family: _Family, nodes: tuple[ir.Node, ...], failed: Any) -> PatternFit:
    if failed is None:
        return PatternFit(family.pattern, family.kernel, nodes, "")
    ends = [item for item in failed.failure_nodes_and_values if isinstance(item, ir.Node)]
    end = ends[0] if ends else None
    where = f" at '{end.name}'" if end is not None else ""
    words = str(failed.reason).removeprefix("OpType mismatch: ").rstrip(".")
    return PatternFit(family.pattern, family.kernel, nodes, f"{words}{where}", end)


def _no_replacement(_: Any, **__: Any) -> None:
    """Nothing is ever replaced: the rule only looks."""
