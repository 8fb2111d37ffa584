# SPDX-License-Identifier: Apache-2.0
"""How the relevance of one step is shared among what it was given: the rule that its operator goes with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from splitfold.runtime.errors import UnsupportedError
from splitfold.runtime.relevance.attention import NormStep
from splitfold.runtime.relevance.composite import Composite, Fallback
from splitfold.runtime.relevance.gates import centred, gate
from splitfold.runtime.relevance.linear import LinearRule, LinearStep
from splitfold.runtime.relevance.operators import Kind, kind_of
from splitfold.runtime.relevance.rule import Bias, Shares, safe, unbroadcast

__all__ = ["Sharing"]

Tensor = Any
Step = Any
"""A `splitfold.runtime.lift.trace.Step`."""

_PLAIN_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
_SUBGRAPHS = ("If", "Loop", "Scan")
_PATHS = (Kind.MOVE, Kind.PRODUCT, Kind.QUOTIENT, Kind.ELEMENTWISE)


class Sharing:
    """Applies a composite to the steps of a trace.

    Args:
        rules: which rule goes with what.
        trace: a `splitfold.runtime.lift.trace.Trace`, whose steps come from the last to the first.
    """

    def __init__(self, rules: Composite, trace: Any) -> None:
        self._rules, self._trace = rules, trace
        self._later: dict[Any, Tensor] = {}
        self._by_kind: dict[Kind, Callable[[Step, Tensor], Shares]] = {
            Kind.LINEAR: self._linear,
            Kind.PRODUCT: self._product,
            Kind.QUOTIENT: self._quotient,
            Kind.SUM: self._sum,
            Kind.SOFTMAX: lambda step, r: rules.softmax.share(step, r),
            Kind.NORM: self._norm,
            Kind.AFFINE: self._affine,
            Kind.ELEMENTWISE: _elementwise,
            Kind.MOVE: _move,
        }

    def shares(self, step: Step, r: Tensor | Mapping[int, Tensor]) -> Shares:
        """Share out the relevance of a step's output; of several outputs it comes by index.

        Raises:
            UnsupportedError: the operator has no rule.
        """
        kind = kind_of(step.operator)
        if kind is None or (kind is Kind.LINEAR and not self._is_product(step)):
            return self._without_rule(step, r)
        return self._by_kind[kind](step, r)

    def _without_rule(self, step: Step, r: Any) -> Shares:
        inside = step.operator in _SUBGRAPHS
        if inside or self._rules.other is Fallback.REFUSE:
            cure = "" if inside else " The rules 'other=gradient' take gradient times input there."
            raise UnsupportedError(
                f"relevance has no rule for the operator {step.operator} (node '{step.origin.name}' of layer "
                f"'{step.layer}').{cure} Signals that need gradients alone, such as taylor, go without rules."
            )
        if isinstance(r, Mapping):
            quotients: Any = {at: part / safe(step.output[at]) for at, part in r.items()}
        else:
            quotients = r / safe(step.output)
        pulled = step.pull(quotients, step.active)
        return Shares({at: step.arguments[at] * tensor for at, tensor in pulled.items()})

    # Products with weights, and of activations

    def _is_product(self, step: Step) -> bool:
        if step.operator == "MatMulNBits":
            return step.active == (0,) and not self._signed(step)
        return step.active in ((0,), (1,), (0, 1))

    def _signed(self, step: Step) -> bool:
        return self._linear_rule(step, 0).by_sign

    def _linear(self, step: Step, r: Tensor) -> Shares:
        if len(step.active) > 1:
            return self._rules.product.share(step, r, self._probabilities(step))
        data = step.active[0]
        rule = self._linear_rule(step, data)
        inside = None
        later = self._later.pop(step.node, None)
        if step.operator in ("Gemm", "Conv", "ConvTranspose") and len(step.arguments) > 2:
            inside = 2 if step.arguments[2] is not None else None
        bias = _inner_bias(step) if inside is not None else None
        total = bias if later is None else later if bias is None else later + bias
        weight = None if step.operator == "MatMulNBits" else 1 - data
        layer = LinearStep(step, data, weight, total, inside, added=False)
        if later is not None:
            layer.z = layer.z + later
        return rule.share(layer, r, self._rules.bias)

    def _linear_rule(self, step: Step, data: int) -> LinearRule:
        node = step.node.args[data]
        while self._operator(node) and kind_of(self._operator(node)) is Kind.MOVE:
            (node, *_) = (other for other in node.all_input_nodes if self._trace.is_active(other))
        return self._rules.first if node.op == "placeholder" else self._rules.linear

    def _probabilities(self, step: Step) -> int | None:
        for at in step.active:
            node = step.node.args[at]
            while kind_of(self._operator(node)) in _PATHS:
                active = [other for other in node.all_input_nodes if self._trace.is_active(other)]
                if len(active) != 1:
                    break
                node = active[0]
            if self._operator(node) == "Softmax":
                return int(at)
        return None

    def _operator(self, node: Any) -> str:
        origin = node.meta.get("onnx")
        return "" if origin is None else str(origin.op_type)

    # Element by element

    def _product(self, step: Step, r: Tensor) -> Shares:
        if len(step.active) == 1:
            (at,) = step.active
            return Shares({at: unbroadcast(r, step.arguments[at])})
        nodes = [step.node.args[at] for at in step.active]
        fixed = gate(nodes[0], nodes[1], self._operator, self._trace.is_active)
        if fixed is not None:
            kept = 1 - fixed
            return Shares({kept: unbroadcast(r, step.arguments[kept])})
        return Shares({at: unbroadcast(r / 2, step.arguments[at]) for at in step.active})

    def _quotient(self, step: Step, r: Tensor) -> Shares:
        at = step.active[0]
        return Shares({at: unbroadcast(r, step.arguments[at])})

    def _sum(self, step: Step, r: Tensor) -> Shares:
        terms = {at: self._signed_term(step, at) for at in step.active}
        constants = [
            self._signed_term(step, at) for at in range(len(step.arguments)) if at not in step.active
        ]
        if len(terms) == 1:
            (at,) = step.active
            node = step.node.args[at]
            if terms[at].shape == step.output.shape and self._is_linear_end(node) and step.operator != "Sub":
                self._later[node] = sum(constants)
                return Shares({at: r})
            if self._rules.bias is Bias.PASS:
                return Shares({at: unbroadcast(r, step.arguments[at])})
        if step.operator == "Sub" and len(terms) == 2 and self._rules.norm.centre_passes:
            nodes = step.node.args
            if centred(nodes[0], nodes[1], self._operator, self._trace.is_active):
                return Shares({0: r})
        kept = constants if self._rules.bias is Bias.ABSORB else []
        z = step.output if len(kept) == len(constants) else sum(terms.values())
        return self._rules.sum.share(terms, kept, z, r)

    def _signed_term(self, step: Step, at: int) -> Tensor:
        return -step.arguments[at] if step.operator == "Sub" and at == 1 else step.arguments[at]

    def _is_linear_end(self, node: Any) -> bool:
        """Whether a node is a product with a constant weight that nothing else reads."""
        if kind_of(self._operator(node)) is not Kind.LINEAR or len(node.users) != 1:
            return False
        step = self._trace.step(node)
        return len(step.active) == 1 and self._is_product(step)

    # Norms and what is linear in other ways

    def _norm(self, step: Step, r: Any) -> Shares:
        r = r[0] if isinstance(r, Mapping) else r
        if step.operator not in _PLAIN_NORMS:
            return Shares({0: r})
        return self._rules.norm.share(_norm_step(step), r)

    def _affine(self, step: Step, r: Any) -> Shares:
        r, z = (r[0], step.output[0]) if isinstance(r, Mapping) else (r, step.output)
        s = r / safe(z)
        pulled = step.pull({0: s} if isinstance(step.output, tuple) else s, step.active)
        found = {at: step.arguments[at] * tensor for at, tensor in pulled.items()}
        if step.operator == "Einsum" and len(found) > 1:
            found = {at: tensor / len(found) for at, tensor in found.items()}
        if step.operator != "BatchNormalization":
            return Shares(found)
        if self._rules.bias is Bias.PASS:
            return Shares({0: r})
        return Shares(found, float((s * z).sum() - found[0].sum()))


def _elementwise(step: Step, r: Tensor) -> Shares:
    at = step.active[0]
    return Shares({at: unbroadcast(r, step.arguments[at])})


def _move(step: Step, r: Any) -> Shares:
    positions: Sequence[int] = step.active
    if positions:
        return Shares(step.pull(r, positions))
    return _into_lists(step, r)


def _into_lists(step: Step, r: Any) -> Shares:
    raise UnsupportedError(f"node '{step.origin.name}' ({step.operator}) reads activations in a list.")


def _inner_bias(step: Step) -> Tensor:
    bias = step.arguments[2]
    if step.operator == "Gemm":
        return bias * step.keywords.get("beta", 1.0)
    return bias.reshape(-1, *([1] * (step.output.ndim - 2)))


def _norm_step(step: Step) -> NormStep:
    x, scale = step.arguments[0], step.arguments[1]
    y = step.output[0] if isinstance(step.output, tuple) else step.output
    bias = step.arguments[2] if len(step.arguments) > 2 else None
    axes = tuple(range(step.keywords.get("axis", -1) % x.ndim, x.ndim))
    centre = step.operator == "LayerNormalization"
    from_mean = x - x.mean(axes, True) if centre else x
    inverse = (from_mean.square().mean(axes, True) + step.keywords.get("epsilon", 1e-5)).rsqrt()
    return NormStep(x, y, scale * inverse, axes if centre else (), bias)
