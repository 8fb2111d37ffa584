# SPDX-License-Identifier: Apache-2.0
"""Which common values of two models can be compared and exchanged: judged by what they are on a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from splitfold.compiler.debug.drift.pairing import Pairing
from splitfold.compiler.debug.drift.probe import Seen, probe
from splitfold.runtime.feeds import Feeds
from splitfold.runtime.target import Target

__all__ = ["Comparable", "comparable"]


@dataclass(frozen=True)
class Comparable:
    """The values to compare.

    Attributes:
        pair: the models, with the counterparts that can be compared.
        sizes: the reference's values on the batch.
        types: those of the compiled model by name, where they have the reference's shape: it can be put in
            place of them.
        refused: why a matched value of the reference is not compared.
    """

    pair: Pairing
    sizes: Mapping[str, Seen]
    types: Mapping[str, Seen]
    refused: Mapping[str, str]


def comparable(pair: Pairing, feeds: Feeds, target: Target, limit: int) -> Comparable:
    """Run both models on `feeds` and return which values can be compared; `limit` bounds the bytes of weights
    opened at once.

    Raises:
        SessionError: a model does not run.
    """
    here = probe(pair.reference, list(pair.counterparts), feeds, target, limit)
    names = {name: None for group in pair.counterparts.values() for name in group}
    there = probe(pair.actual, list(names), feeds, target, limit)
    refused = {}
    types: dict[str, Seen] = {}
    for name, group in pair.counterparts.items():
        first, last = here[name], there[group[-1]]
        if _is_float(first) != _is_float(last):
            refused[name] = f"'{name}' is {first.dtype} here and {last.dtype} there"
            continue
        types |= {other: there[other] for other in group if _fits(first, there[other])}
    kept = {name: group for name, group in pair.counterparts.items() if name not in refused}
    return Comparable(replace(pair, counterparts=kept), here, types, refused)


def _is_float(seen: Seen) -> bool:
    return bool(np.issubdtype(seen.dtype, np.floating))


def _fits(reference: Seen, actual: Seen) -> bool:
    return reference.shape == actual.shape and _is_float(reference) == _is_float(actual)
