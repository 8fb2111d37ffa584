# SPDX-License-Identifier: Apache-2.0
"""Internal values of a run, a few at a time, so that memory stays bounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.session import Optimization, Session
from splitfold.runtime.target import Target

__all__ = ["tapped"]

_FIRST, _MOST = 16, 256
"""Values fetched by the first run, and by any run."""
_SLICE_BYTES = 128_000_000
"""Bytes that the values fetched by one run should take together."""


def tapped(
    model: ir.Model, names: Sequence[str], feeds: Feeds, target: Target
) -> Iterator[tuple[str, Array]]:
    """Yield (name, array) of the values `names` of the main graph in that order, the runtime's optimisations
    off; a name may repeat.

    Raises:
        SessionError: the model does not run, or has no value of such a name.
    """
    if not names:
        return
    session = Session(model, target, optimization=Optimization.OFF, taps=names)
    start, size = 0, _FIRST
    while start < len(names):
        part = names[start : start + size]
        found = session.run(feeds, list(dict.fromkeys(part)))
        yield from ((name, found[name]) for name in part)
        taken = sum(array.nbytes for array in found.values())
        start += len(part)
        size = min(_MOST, max(1, int(_SLICE_BYTES * len(part) / max(taken, 1))))
