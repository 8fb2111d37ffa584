# SPDX-License-Identifier: Apache-2.0
"""The numbers by which outliers are known, as Quantizable Transformers measures them (arXiv 2306.12929,
section 5)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from splitfold.runtime.feeds import Array

__all__ = ["AttentionShares", "Extremes", "kurtosis"]

_EPSILON = 1e-6


def kurtosis(x: Array) -> float:
    """Return E[(x - mean)^4] / (variance^2 + 1e-6) over all elements: 3 for a normal distribution."""
    wide = x.astype(np.float64).ravel()
    centred = wide - wide.mean()
    squared = centred * centred
    return float((squared * squared).mean() / (squared.mean() ** 2 + _EPSILON))


@dataclass
class Extremes:
    """Running over samples: the mean of their infinity norms and kurtoses, and the largest magnitude."""

    samples: int = 0
    norms: float = 0.0
    kurtoses: float = 0.0
    largest: float = 0.0

    def add(self, sample: Array) -> None:
        """Count one sample, all elements of it that are no padding."""
        if not sample.size:
            return
        norm = float(np.abs(sample).max())
        self.samples += 1
        self.norms += norm
        self.kurtoses += kurtosis(sample)
        self.largest = max(self.largest, norm)

    @property
    def infinity_norm(self) -> float:
        """Mean over samples of the largest magnitude."""
        return self.norms / max(1, self.samples)

    @property
    def kurtosis(self) -> float:
        """Mean over samples."""
        return self.kurtoses / max(1, self.samples)


@dataclass
class AttentionShares:
    """Running over samples, heads and queries: which share of probability goes where.

    Attributes:
        queries: rows counted, over all heads.
        keys: probabilities counted: of keys that are no padding and that the query may see.
        first: sum of the probabilities of the first token.
        delimiters: sum of the probabilities of delimiter tokens.
        zeros: probabilities that are exactly 0.
        heads: sum over queries of the first token's probability, a head.
    """

    queries: int = 0
    keys: int = 0
    first: float = 0.0
    delimiters: float = 0.0
    zeros: int = 0
    heads: Array = field(default_factory=lambda: np.zeros(0))

    def add(self, p: Array, seen: Array, delimiters: Array | None) -> None:
        """Count one sample.

        Args:
            p: probabilities [heads, queries, keys], of queries that are no padding.
            seen: bool [queries, keys]: keys that are no padding and that the query may see.
            delimiters: bool [keys], or None.
        """
        wide = p.astype(np.float64)
        self.queries += p.shape[0] * p.shape[1]
        self.keys += p.shape[0] * int(seen.sum())
        self.first += float(wide[..., 0].sum())
        self.zeros += int((p[:, seen] == 0).sum())
        if delimiters is not None:
            self.delimiters += float(wide[..., delimiters].sum())
        heads = wide[..., 0].sum(1)
        self.heads = heads if not self.heads.size else self.heads + heads

    def share(self, total: float) -> float:
        """Return a sum over queries as a share of all probability."""
        return total / max(1, self.queries)

    @property
    def zero_share(self) -> float:
        """Share of exact zeros among keys that could be seen."""
        return self.zeros / max(1, self.keys)

    @property
    def head_shares(self) -> tuple[float, ...]:
        """The first token's share, a head."""
        rows = max(1, self.queries // max(1, len(self.heads)))
        return tuple(float(total) / rows for total in self.heads)
