# SPDX-License-Identifier: Apache-2.0
"""The canonical form that all other passes expect."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common

from splitfold.passes.base import Context, Contract, Findings, Pass
from splitfold.passes.fold_batchnorm import fold_batchnorm
from splitfold.passes.fold_constants import fold_constants
from splitfold.passes.identity import inherit_missing, mark_call, name_layers
from splitfold.passes.opset import default_opset, raise_opset
from splitfold.passes.shapes import infer_shapes
from splitfold.passes.turn_gemm import turn_gemms
from splitfold.passes.values import constant, forget_names, import_domains, int_attribute
from splitfold.runtime.digest import structure_digest

__all__ = ["CanonicalizePass", "name_all"]

logger = logging.getLogger(__name__)

_OLDEST_IR = 4
"""From here on an initializer need not be a graph input too."""


@dataclass(frozen=True)
class CanonicalizePass(Pass):
    """Bring a model into canonical form, exactly.

    Functions are inlined, Constant nodes and constant subexpressions become initializers, initializers are
    constants (not inputs with a default), names are unique, Identity and inactive Dropout are gone,
    BatchNormalization is folded into the layer before it, a Gemm's weight is [K, N], shapes are inferred,
    dead code is removed, and every node carries its layer's name. Looks into subgraphs. Q/DQ that are there
    are left alone.

    Before::

        y = Gemm<transB=1>(x, W, b); z = Identity(y)

    After::

        z = Gemm(x, W_turned, b)
    """

    name: ClassVar[str] = "canonicalize"
    contract: ClassVar[Contract] = Contract.EXACT

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        before = (model.ir_version, structure_digest(model))
        common.TopologicalSortPass()(model)
        import_domains(model)
        model.ir_version = max(model.ir_version, _OLDEST_IR)
        name_all(model, findings)
        _raise_opset(model, findings)
        forget_names(model)
        _clean(model)
        counts: Counter[str] = Counter()
        while _run_steps(model, counts, missed := Findings()):
            _clean(model)  # what is dead reads too: it would hide that a layer has one reader
        findings.missed.extend(missed.missed)  # of the last round: what was still in the way when none moved
        for what, count in counts.items():
            findings.apply("model", f"{what}: {count}")
        if orphans := inherit_missing(model):
            logger.debug("%d nodes have no layer", len(orphans))
        return (model.ir_version, structure_digest(model)) != before


def name_all(model: ir.Model, findings: Findings) -> None:
    """Inline calls and name every value, node and layer, changing nothing else: after it a model and what
    was compiled from it can be matched."""
    _inline(model, findings)
    _drop_overridable(model, findings)
    _lift_constants(model, findings)
    common.NameFixPass()(model)
    name_layers(model)


def _inline(model: ir.Model, findings: Findings) -> None:
    calls = [node for node in model.graph.all_nodes() if node.op_identifier() in model.functions]
    for node in calls:
        mark_call(node)
    result = common.InlinePass()(model)
    if result.modified:
        findings.apply("model", f"function calls inlined: {len(calls)}")


def _raise_opset(model: ir.Model, findings: Findings) -> None:
    present = default_opset(model)
    if reason := raise_opset(model):
        findings.skip("model", reason)
    elif default_opset(model) != present:
        findings.apply("model", f"opset raised from {present} to {default_opset(model)}")
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        common.NameFixPass()(model)
        inherit_missing(model)  # what the converter added serves a node that was there


def _lift_constants(model: ir.Model, findings: Findings) -> None:
    count = sum(
        node.op_type == "Constant" and node.domain in ("", "ai.onnx") for node in model.graph.all_nodes()
    )
    if common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model).modified:
        findings.apply("model", f"Constant nodes made initializers: {count}")


def _run_steps(model: ir.Model, counts: Counter[str], missed: Findings) -> bool:
    """Run every step once, add up what it did, and return whether any did something."""
    before = counts.total()
    for step, what in _STEPS:
        if count := step(model, missed):
            counts[what] += count
    return counts.total() > before


def _drop_overridable(model: ir.Model, findings: Findings) -> None:
    names = [value.name for value in model.graph.inputs if value.name in model.graph.initializers]
    if names:
        common.RemoveInitializersFromInputsPass()(model)
        findings.notes.append(
            f"{len(names)} initializers were also graph inputs ({names[0]}, ...): they are constants now"
        )


def _drop_identities(model: ir.Model, _: Findings) -> int:
    """Remove Identity, and Dropout in inference, where the value stays in the same graph."""
    return sum(_drop_identity(node) for graph in model.graphs() for node in list(graph) if _is_identity(node))


def _is_identity(node: ir.Node) -> bool:
    if node.domain not in ("", "ai.onnx") or node.inputs[:1] in ([], [None]):
        return False
    if node.op_type == "Dropout":
        training = node.inputs[2] if len(node.inputs) > 2 else None
        mask_used = any(output.uses() or output.is_graph_output() for output in node.outputs[1:])
        return (
            not mask_used
            and (training is None or _is_false(training))
            and int_attribute(node, "is_test", 1) == 1
        )
    return node.op_type == "Identity"


def _is_false(value: ir.Value) -> bool:
    tensor = constant(value)
    return tensor is not None and not tensor.numpy().any()


def _drop_identity(node: ir.Node) -> bool:
    source, result = node.inputs[0], node.outputs[0]
    graph = node.graph
    if source is None or graph is None:
        return False
    if result.is_graph_output():
        produced_here = source.producer() is not None and source.graph is graph
        if not produced_here or source.is_graph_output() or _is_turned_for_gemm(source):
            return False
        name = result.name
        result.name = f"{name}_dropped"
        result.replace_all_uses_with(source, replace_graph_outputs=True)
        source.name = name
    else:
        result.replace_all_uses_with(source)
    if source.type is None:
        source.type = result.type
    if source.shape is None:
        source.shape = result.shape
    graph.remove(node, safe=True)
    return True


def _is_turned_for_gemm(value: ir.Value) -> bool:
    """Return whether a Gemm reads this Transpose's output.

    The runtime fuses the two and loses the value: it cannot open the model where that is a graph output
    itself (seen in 1.31.1).
    """
    producer = value.producer()
    turned = producer is not None and producer.op_type == "Transpose"
    return turned and any(use.node.op_type == "Gemm" for use in value.uses())


def _infer_shapes(model: ir.Model, _: Findings) -> int:
    infer_shapes(model)
    return 0


def _clean(model: ir.Model) -> None:
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    common.RemoveUnusedOpsetsPass()(model)


_STEPS: tuple[tuple[Callable[[ir.Model, Findings], int], str], ...] = (
    (_drop_identities, "identities dropped"),
    (_infer_shapes, "shapes inferred"),  # the norm's fold asks for ranks
    (fold_constants, "constant nodes folded"),
    (turn_gemms, "Gemms turned to [K, N]"),
    (fold_batchnorm, "batch norms folded"),
    (_infer_shapes, "shapes inferred"),  # again, with the folded constants
)
