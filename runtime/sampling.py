# SPDX-License-Identifier: Apache-2.0
"""Choosing the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from splitfold.runtime.feeds import Array

__all__ = ["Sampler", "Sampling"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: logits are divided by it before they are drawn from; 0 takes the most likely token.
        top_k: draw from this many of the most likely tokens; 0 is from all.
        seed: of the draws; the same seed gives the same text.

    Raises:
        ValueError: temperature or top_k is negative.
    """

    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not np.isfinite(self.temperature) or self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; it is a number of at least 0.")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it is at least 0, which draws from all tokens.")


class Sampler:
    """Draws tokens, one after the other."""

    def __init__(self, sampling: Sampling) -> None:
        self._how = sampling
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits: Array) -> int:
        """Return a token for logits [vocabulary].

        Equal logits at the edge of the top k: the lower tokens stay.
        """
        if self._how.temperature == 0:
            return int(np.argmax(logits))
        scaled = np.asarray(logits, np.float64) / self._how.temperature
        kept = np.arange(len(scaled))
        if 0 < self._how.top_k < len(scaled):
            kept = np.sort(np.argsort(-scaled, kind="stable")[: self._how.top_k])
        powers = np.exp(scaled[kept] - scaled[kept].max())
        return int(self._random.choice(kept, p=powers / powers.sum()))
