# SPDX-License-Identifier: Apache-2.0
"""What a rule of relevance propagation is, and the arithmetic that all of them share."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

__all__ = ["Bias", "Rule", "Shares", "safe", "unbroadcast"]

Tensor = Any
"""A torch tensor; torch itself is not imported here."""

EPSILON = 1e-6
"""What keeps quotients finite where a rule says nothing else."""


class Bias(enum.Enum):
    """What becomes of the relevance that belongs to constants which are added."""

    ABSORB = "absorb"
    """They keep their share, as the rules are written (Bach et al., 2015, eq. 58-60)."""
    PASS = "pass"
    """They are left out of the sums, so that all of it goes on to the activations."""


@dataclass(frozen=True)
class Shares:
    """How a step shares out what reached it.

    Attributes:
        inputs: relevance by position of the argument, in its shape.
        absorbed: what constants keep.
    """

    inputs: Mapping[int, Tensor]
    absorbed: float = 0.0


@dataclass(frozen=True)
class Rule:
    """A rule; its fields are numbers. Its text form is ``word`` or ``word(number;number)``."""

    word: ClassVar[str]

    def __str__(self) -> str:
        values = [getattr(self, item.name) for item in fields(self)]
        if all(value == item.default for value, item in zip(values, fields(self), strict=True)):
            return self.word
        return f"{self.word}({';'.join('none' if value is None else f'{value:g}' for value in values)})"


def safe(z: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Return `z` moved away from 0 by `epsilon`; 0 itself goes up."""
    return z + epsilon * ((z >= 0).to(z.dtype) * 2 - 1)


def unbroadcast(x: Tensor, like: Tensor) -> Tensor:
    """Return `x` summed over the axes along which `like` was broadcast, in the shape of `like`."""
    while x.ndim > like.ndim:
        x = x.sum(0)
    for axis, size in enumerate(like.shape):
        if size == 1 and x.shape[axis] != 1:
            x = x.sum(axis, keepdim=True)
    return x
