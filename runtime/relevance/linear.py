# SPDX-License-Identifier: Apache-2.0
"""Rules for linear layers and convolutions.

z_j = sum_i x_i w_ij + b_j. Each rule says how the relevance of z_j is shared among the x_i.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

from splitfold.runtime.relevance.rule import EPSILON, Bias, Rule, Shares, safe

__all__ = ["AlphaBeta", "Epsilon", "Gamma", "LinearRule", "LinearStep", "ZBox", "ZPlus"]

Tensor = Any


class LinearStep:
    """A product of activations with a constant weight, with what is added to it.

    Args:
        step: the call, a `splitfold.runtime.lift.trace.Step`.
        data: position of the activations.
        weight: position of the weight, or None where it is not one tensor.
        bias: what is added to the product, in a shape that broadcasts, or None.
        inside: position of an argument that the call itself adds, or None.
        added: whether `bias` is added after the call.
    """

    def __init__(
        self, step: Any, data: int, weight: int | None, bias: Tensor, inside: int | None, added: bool
    ) -> None:
        self._step, self._data, self._weight, self._inside = step, data, weight, inside
        self.x: Tensor = step.arguments[data]
        self.w: Tensor = None if weight is None else step.arguments[weight]
        self.bias = bias
        self.z: Tensor = step.output + bias if added else step.output
        """The product with what is added."""

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        """Return the product of `x` with `w`, in place of activations and weight, nothing added."""
        return self._step.call(self._replaced(x, w))

    def back(self, s: Tensor, w: Tensor) -> Tensor:
        """Return the transposed product of `s` with `w`: c_i = sum_j w_ij s_j."""
        if self._step.operator in ("MatMul", "Gemm") and self._data == 0 and w.ndim == 2:
            factor = self._step.keywords.get("alpha", 1.0)
            turned = w if self._step.keywords.get("transB", 0) else w.T
            if not self._step.keywords.get("transA", 0):
                return s @ turned if factor == 1 else factor * (s @ turned)
        return self._step.pull(s, (self._data,), self._replaced(self.x, w))[self._data]

    def plain(self) -> Tensor:
        """Return the product, nothing added."""
        return self.z if self.bias is None else self.z - self.bias

    def shares(self, x: Tensor, absorbed: float = 0.0) -> Shares:
        """Return `x` as the relevance of the activations."""
        return Shares({self._data: x}, absorbed)

    def _replaced(self, x: Tensor, w: Tensor) -> dict[int, Tensor]:
        replaced = {self._data: x}
        if self._weight is not None:
            replaced[self._weight] = w
        if self._inside is not None:
            replaced[self._inside] = None
        return replaced


class LinearRule(Rule, abc.ABC):
    """A rule for linear layers."""

    by_sign: ClassVar[bool] = True
    """Whether it needs the weight as one tensor."""

    @abc.abstractmethod
    def share(self, layer: LinearStep, r: Tensor, bias: Bias) -> Shares:
        """Share out the relevance `r` of the layer's output."""


@dataclass(frozen=True)
class Epsilon(LinearRule):
    """R_i = sum_j x_i w_ij / (z_j + epsilon sign z_j) R_j (Bach et al., 2015, eq. 58)."""

    word: ClassVar[str] = "epsilon"
    by_sign: ClassVar[bool] = False
    epsilon: float = EPSILON

    def share(self, layer: LinearStep, r: Tensor, bias: Bias) -> Shares:
        """See `LinearRule`."""
        kept = layer.bias if bias is Bias.ABSORB else None
        s = r / safe(layer.z if kept is not None else layer.plain(), self.epsilon)
        return layer.shares(layer.x * layer.back(s, layer.w), _sum(kept, s))


@dataclass(frozen=True)
class Gamma(LinearRule):
    """Contributions of the sign of z_j count 1 + gamma times (Montavon et al., 2019, section 10.2.3; for
    activations of both signs as Andéol et al., 2021): with gamma = 0 the epsilon rule, with a large one the
    z+ rule for outputs above 0."""

    word: ClassVar[str] = "gamma"
    gamma: float = 0.25
    epsilon: float = EPSILON

    def share(self, layer: LinearStep, r: Tensor, bias: Bias) -> Shares:
        """See `LinearRule`."""
        kept = layer.bias if bias is Bias.ABSORB else None
        z = layer.z if kept is not None else layer.plain()
        up = (z >= 0).to(z.dtype)
        x, w = _signs(layer.x), _signs(layer.w)
        total, absorbed = 0, 0.0
        for sign, here in ((1, up), (-1, 1 - up)):
            alike = layer.product(x[1], w[sign]) + layer.product(x[-1], w[-sign])
            own = None if kept is None else _signs(kept)[sign]
            s = here * r / safe(z + self.gamma * (alike if own is None else alike + own), self.epsilon)
            total = total + layer.x * layer.back(s, layer.w)
            total = total + self.gamma * (x[1] * layer.back(s, w[sign]) + x[-1] * layer.back(s, w[-sign]))
            absorbed += _sum(kept, s) + self.gamma * _sum(own, s)
        return layer.shares(total, absorbed)


@dataclass(frozen=True)
class AlphaBeta(LinearRule):
    """Positive contributions share alpha R_j, negative ones (1 - alpha) R_j (Bach et al., 2015, eq. 60)."""

    word: ClassVar[str] = "alpha-beta"
    alpha: float = 2.0
    epsilon: float = EPSILON

    def __post_init__(self) -> None:
        if self.alpha < 1:
            raise ValueError(f"alpha is {self.alpha}; it is 1 or more, and beta is alpha - 1.")

    def share(self, layer: LinearStep, r: Tensor, bias: Bias) -> Shares:
        """See `LinearRule`."""
        kept = layer.bias if bias is Bias.ABSORB else None
        x, w = _signs(layer.x), _signs(layer.w)
        total, absorbed = 0, 0.0
        for sign, factor in ((1, self.alpha), (-1, 1 - self.alpha)):
            if factor:
                z = layer.product(x[1], w[sign]) + layer.product(x[-1], w[-sign])
                own = None if kept is None else _signs(kept)[sign]
                z = z if own is None else z + own
                s = factor * r / (z + sign * self.epsilon)
                total = total + x[1] * layer.back(s, w[sign]) + x[-1] * layer.back(s, w[-sign])
                absorbed += _sum(own, s)
        return layer.shares(total, absorbed)


@dataclass(frozen=True)
class ZPlus(LinearRule):
    """Only positive contributions count: alpha-beta with alpha = 1 (Montavon et al., 2017)."""

    word: ClassVar[str] = "z-plus"
    epsilon: float = EPSILON

    def share(self, layer: LinearStep, r: Tensor, bias: Bias) -> Shares:
        """See `LinearRule`."""
        return AlphaBeta(1.0, self.epsilon).share(layer, r, bias)


@dataclass(frozen=True)
class ZBox(LinearRule):
    """For a layer that reads an input between two bounds, such as pixels (Montavon et al., 2017, eq. 19):
    R_i = sum_j (x_i w_ij - low w_ij+ - high w_ij-) / sum_i (...) R_j. Constants that are added keep nothing.

    Args:
        low: lower bound; none is the least number of each sample.
        high: upper bound; none is the greatest.
        epsilon: keeps quotients finite.
    """

    word: ClassVar[str] = "z-box"
    low: float | None = None
    high: float | None = None
    epsilon: float = EPSILON

    def share(self, layer: LinearStep, r: Tensor, bias: Bias) -> Shares:
        """See `LinearRule`."""
        x, w = layer.x, _signs(layer.w)
        axes = tuple(range(1, x.ndim)) or (0,)
        low = x.amin(axes, keepdim=True) if self.low is None else self.low
        high = x.amax(axes, keepdim=True) if self.high is None else self.high
        low, high = (x * 0 + bound for bound in (low, high))
        s = r / safe(layer.plain() - layer.product(low, w[1]) - layer.product(high, w[-1]), self.epsilon)
        return layer.shares(
            x * layer.back(s, layer.w) - low * layer.back(s, w[1]) - high * layer.back(s, w[-1])
        )


def _signs(x: Tensor) -> dict[int, Tensor]:
    """Return the positive part of `x` (1) and the negative one (-1)."""
    return {1: x.clamp(min=0), -1: x.clamp(max=0)}


def _sum(bias: Tensor, s: Tensor) -> float:
    return 0.0 if bias is None else float((bias * s).sum())
