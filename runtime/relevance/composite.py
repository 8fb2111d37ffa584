# SPDX-License-Identifier: Apache-2.0
"""Which rule goes with which kind of operator: a value with a text form."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field, fields
from typing import Any

from splitfold.runtime.errors import SplitfoldError, did_you_mean
from splitfold.runtime.relevance.attention import (
    FixedWeights,
    Half,
    NormalisedShare,
    NormDetached,
    NormIdentity,
    NormRule,
    ProductRule,
    Share,
    SoftmaxIdentity,
    SoftmaxRule,
    SoftmaxStop,
    SoftmaxTaylor,
    SumRule,
)
from splitfold.runtime.relevance.linear import AlphaBeta, Epsilon, Gamma, LinearRule, ZBox, ZPlus
from splitfold.runtime.relevance.rule import Bias, Rule

__all__ = ["Composite", "Fallback", "attention_rules", "conservative_rules", "identity_rules"]

_LINEAR = (Epsilon, Gamma, AlphaBeta, ZPlus, ZBox)
_RULES: dict[str, tuple[type[Rule], ...]] = {
    "linear": _LINEAR,
    "first": _LINEAR,
    "product": (Half, FixedWeights),
    "softmax": (SoftmaxTaylor, SoftmaxIdentity, SoftmaxStop),
    "norm": (NormIdentity, NormDetached),
    "sum": (Share, NormalisedShare),
}
_ITEM = re.compile(r"^(?P<word>[a-z-]+)(\((?P<numbers>[^()]*)\))?$")


class Fallback(enum.Enum):
    """What happens at an operator that no rule is for."""

    REFUSE = "refuse"
    """It is an error that names the operator."""
    GRADIENT = "gradient"
    """Gradient times input, scaled by R / z: the first-order expansion."""


@dataclass(frozen=True)
class Composite:
    """Rules by kind of operator.

    The text form names what differs from the default: ``linear=gamma(0.25;1e-06),first=z-box,bias=pass``.
    Elementwise functions pass relevance unchanged whatever the rules, and products of two activations element
    by element halve it, but where one is a function of the other's source (x * sigmoid(x), x / norm(x)),
    which then counts as a constant.

    Attributes:
        linear: MatMul, Gemm and Conv with a constant weight.
        first: those of them that read a float input of the model, but for steps that only move numbers.
        product: matrix products of two activations.
        softmax: Softmax and LogSoftmax.
        norm: LayerNormalization and the like.
        sum: Add, Sub, Sum.
        bias: what becomes of the shares of constants that are added.
        other: what happens at an operator that no rule is for.
    """

    linear: LinearRule = field(default_factory=Epsilon)
    first: LinearRule = field(default_factory=Epsilon)
    product: ProductRule = field(default_factory=Half)
    softmax: SoftmaxRule = field(default_factory=SoftmaxTaylor)
    norm: NormRule = field(default_factory=NormDetached)
    sum: SumRule = field(default_factory=Share)
    bias: Bias = Bias.ABSORB
    other: Fallback = Fallback.REFUSE

    def __str__(self) -> str:
        plain = Composite()
        differing = (
            item.name for item in fields(self) if getattr(self, item.name) != getattr(plain, item.name)
        )
        return ",".join(f"{name}={_text(getattr(self, name))}" for name in differing)

    @classmethod
    def parse(cls, text: str) -> Composite:
        """Return the composite of a text form.

        Raises:
            SplitfoldError: no such kind of operator or rule, or a number that does not fit.
        """
        found: dict[str, Any] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, _, word = item.partition("=")
            if name not in {known.name for known in fields(cls)}:
                near = did_you_mean(name, [known.name for known in fields(cls)])
                raise SplitfoldError(f"there are no rules for '{name}'.{near}")
            found[name] = _parsed(name, word)
        return cls(**found)


def attention_rules() -> Composite:
    """Return the rules of AttnLRP as its authors run them, with norms linear at a fixed deviation: the
    default.

    (The identity rule for a whole LayerNormalization, mean and bias included, is not bounded: what it hands
    to a number near 0 is blown up by the next share. On a post-norm encoder it diverges.)
    """
    return Composite()


def conservative_rules() -> Composite:
    """Return the rules of Ali et al.: attention probabilities and deviations of norms are constants."""
    return Composite(product=FixedWeights(), softmax=SoftmaxStop())


def identity_rules() -> Composite:
    """Return the rules of Chefer et al.: positive contributions, biases left out, identity through softmax
    and norms, normalised shares of sums, z-box at the input."""
    return Composite(
        linear=ZPlus(),
        first=ZBox(),
        softmax=SoftmaxIdentity(),
        norm=NormIdentity(),
        sum=NormalisedShare(),
        bias=Bias.PASS,
    )


def _text(value: Any) -> str:
    return str(value.value) if isinstance(value, enum.Enum) else str(value)


def _parsed(name: str, text: str) -> Rule | Bias | Fallback:
    choices: tuple[Any, ...] = {"bias": tuple(Bias), "other": tuple(Fallback)}.get(name, ())
    for choice in choices:
        if choice.value == text:
            return choice  # type: ignore[no-any-return]
    match = _ITEM.match(text)
    kinds = {kind.word: kind for kind in _RULES.get(name, ())}
    if match is None or match["word"] not in kinds:
        words = [*kinds, *(choice.value for choice in choices)]
        raise SplitfoldError(
            f"unknown rule '{text}' for {name}.{did_you_mean(text, words)} There are {', '.join(words)}."
        )
    kind = kinds[match["word"]]
    try:
        numbers = [_number(item) for item in (match["numbers"] or "").split(";") if item.strip()]
        return kind(*numbers)
    except (TypeError, ValueError) as error:
        raise SplitfoldError(f"rule '{text}' for {name}: {error}") from error


def _number(text: str) -> float | None:
    return None if text.strip() == "none" else float(text)
