# SPDX-License-Identifier: Apache-2.0
"""Rules for what attention adds to linear layers: softmax, products of activations, norms, residual sums.

AttnLRP: Achtibat et al., ICML 2024, arXiv:2402.05602. Conservative: Ali et al., ICML 2022, arXiv:2202.07304.
Identity rules and normalised shares: Chefer et al., CVPR 2021, arXiv:2012.09838.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from splitfold.runtime.relevance.rule import EPSILON, Rule, Shares, safe, unbroadcast

__all__ = [
    "FixedWeights",
    "Half",
    "NormDetached",
    "NormIdentity",
    "NormRule",
    "NormStep",
    "NormalisedShare",
    "ProductRule",
    "Share",
    "SoftmaxIdentity",
    "SoftmaxRule",
    "SoftmaxStop",
    "SoftmaxTaylor",
    "SumRule",
]

Tensor = Any


class SoftmaxRule(Rule, abc.ABC):
    """A rule for softmax."""

    @abc.abstractmethod
    def share(self, step: Any, r: Tensor) -> Shares:
        """Share out the relevance `r` of the probabilities."""


@dataclass(frozen=True)
class SoftmaxTaylor(SoftmaxRule):
    """R_i = x_i (R_i - s_i sum_j R_j) (AttnLRP, proposition 3.1): the gradient times the input, at R_j / s_j.
    It does not conserve: the expansion's constant term keeps the rest. What is masked gets nothing."""

    word: ClassVar[str] = "taylor"

    def share(self, step: Any, r: Tensor) -> Shares:
        """See `SoftmaxRule`."""
        x, s = step.arguments[0], step.output
        alive = s != 0
        quotient = (r / s.where(alive, s + 1)) * alive
        pulled = step.pull(quotient, (0,))[0]
        passed = x.where(alive, x * 0) if x.isfinite().all() else x.nan_to_num(0, 0, 0) * alive
        found = passed * pulled
        return Shares({0: found}, float(r.sum() - found.sum()))


@dataclass(frozen=True)
class SoftmaxIdentity(SoftmaxRule):
    """All relevance passes unchanged (Chefer et al.)."""

    word: ClassVar[str] = "identity"

    def share(self, step: Any, r: Tensor) -> Shares:
        """See `SoftmaxRule`."""
        return Shares({0: r})


@dataclass(frozen=True)
class SoftmaxStop(SoftmaxRule):
    """Probabilities count as constants, which keep what reaches them (Ali et al., section 3.1)."""

    word: ClassVar[str] = "stop"

    def share(self, step: Any, r: Tensor) -> Shares:
        """See `SoftmaxRule`."""
        return Shares({0: r * 0}, float(r.sum()))


class ProductRule(Rule, abc.ABC):
    """A rule for the matrix product of two activations."""

    @abc.abstractmethod
    def share(self, step: Any, r: Tensor, probabilities: int | None) -> Shares:
        """Share out the relevance `r` of the product.

        Args:
            step: the call.
            r: relevance of its output.
            probabilities: position of the operand that a softmax makes, or None.
        """


@dataclass(frozen=True)
class Half(ProductRule):
    """Each operand gets half: R_a = a * d(ab)/da (R / 2ab) (AttnLRP, proposition 3.3; Chefer et al.)."""

    word: ClassVar[str] = "half"
    epsilon: float = EPSILON

    def share(self, step: Any, r: Tensor, probabilities: int | None) -> Shares:
        """See `ProductRule`."""
        s = r / safe(step.output, self.epsilon) / len(step.active)
        pulled = step.pull(s, step.active)
        return Shares({at: step.arguments[at] * tensor for at, tensor in pulled.items()})


@dataclass(frozen=True)
class FixedWeights(ProductRule):
    """The operand that a softmax makes counts as constant: all relevance goes to the other one (Ali et al.,
    section 3.1); without such an operand each gets half."""

    word: ClassVar[str] = "fixed-weights"
    epsilon: float = EPSILON

    def share(self, step: Any, r: Tensor, probabilities: int | None) -> Shares:
        """See `ProductRule`."""
        if probabilities is None:
            return Half(self.epsilon).share(step, r, None)
        others = [at for at in step.active if at != probabilities]
        pulled = step.pull(r / safe(step.output, self.epsilon), others)
        return Shares({at: step.arguments[at] * tensor for at, tensor in pulled.items()})


@dataclass(frozen=True)
class NormStep:
    """A norm along some axes: scale * (x - mean) / deviation + bias.

    Attributes:
        x: what is normalized.
        y: what comes out.
        factor: scale over deviation, in a shape that broadcasts.
        axes: along which the mean is subtracted; empty where it is not.
        bias: what is added, or None.
    """

    x: Tensor
    y: Tensor
    factor: Tensor
    axes: tuple[int, ...]
    bias: Tensor


class NormRule(Rule, abc.ABC):
    """A rule for LayerNormalization, RMSNormalization and the same written out in single operators."""

    centre_passes: ClassVar[bool] = True
    """Whether subtracting a mean passes all relevance on."""

    @abc.abstractmethod
    def share(self, norm: NormStep, r: Tensor) -> Shares:
        """Share out the relevance `r` of what is normalized, at position 0."""


@dataclass(frozen=True)
class NormIdentity(NormRule):
    """All relevance passes unchanged (AttnLRP, proposition 3.4; Chefer et al.)."""

    word: ClassVar[str] = "identity"

    def share(self, norm: NormStep, r: Tensor) -> Shares:
        """See `NormRule`."""
        return Shares({0: r})


@dataclass(frozen=True)
class NormDetached(NormRule):
    """The deviation counts as a constant, and the epsilon rule shares what is linear then (Ali et al.,
    section 3.2); the bias keeps its share."""

    word: ClassVar[str] = "detached"
    centre_passes: ClassVar[bool] = False
    epsilon: float = EPSILON

    def share(self, norm: NormStep, r: Tensor) -> Shares:
        """See `NormRule`."""
        s = r / safe(norm.y, self.epsilon)
        back = s * norm.factor
        back = back - back.mean(norm.axes, True) if norm.axes else back
        absorbed = 0.0 if norm.bias is None else float((s * norm.bias).sum())
        return Shares({0: norm.x * back}, absorbed)


class SumRule(Rule, abc.ABC):
    """A rule for sums, residual ones among them."""

    @abc.abstractmethod
    def share(self, terms: Mapping[int, Tensor], constants: Sequence[Tensor], z: Tensor, r: Tensor) -> Shares:
        """Share out the relevance `r` of the sum `z`.

        Args:
            terms: activations with the signs that they have in the sum, by position.
            constants: constants with theirs, which keep their share; none where they are passed over.
            z: the sum of all of these.
            r: its relevance.
        """


@dataclass(frozen=True)
class Share(SumRule):
    """By contribution: R_a = a / (a + b) R (the epsilon rule; AttnLRP, section 3.1)."""

    word: ClassVar[str] = "share"
    epsilon: float = EPSILON

    def share(self, terms: Mapping[int, Tensor], constants: Sequence[Tensor], z: Tensor, r: Tensor) -> Shares:
        """See `SumRule`."""
        s = r / safe(z, self.epsilon)
        absorbed = sum(float((s * constant).sum()) for constant in constants)
        return Shares({at: unbroadcast(term * s, term) for at, term in terms.items()}, absorbed)


@dataclass(frozen=True)
class NormalisedShare(SumRule):
    """By contribution, then scaled so that in each sample the terms' absolute sums share what came (Chefer et
    al., eq. 9): no cancellation, and conserved."""

    word: ClassVar[str] = "normalised"
    epsilon: float = 1e-9

    def share(self, terms: Mapping[int, Tensor], constants: Sequence[Tensor], z: Tensor, r: Tensor) -> Shares:
        """See `SumRule`."""
        plain = Share(self.epsilon).share(terms, constants, z, r)
        if len(terms) < 2 or any(term.shape != z.shape for term in terms.values()):
            return plain
        axes = tuple(range(1, z.ndim)) or (0,)
        came = r.sum(axes, keepdim=True)
        sums = {at: found.sum(axes, keepdim=True) for at, found in plain.inputs.items()}
        whole = sum(total.abs() for total in sums.values())
        scaled = {
            at: found * (sums[at].abs() / safe(whole, self.epsilon) * came / safe(sums[at], self.epsilon))
            for at, found in plain.inputs.items()
        }
        return Shares(scaled)
