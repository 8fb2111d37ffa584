# SPDX-License-Identifier: Apache-2.0
"""A walk through a model, stretch by stretch, on a few batches: only the values that are still needed are
held, and only the weights of the stretch at hand are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from splitfold.passes.submodel import read_values, submodel, type_inputs
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.session import Optimization, Session
from splitfold.runtime.target import Target

__all__ = ["Walk"]


class Walk:
    """Computes values of the main graph of `model`, in order of execution.

    Args:
        model: is not changed, and must not be while the walk goes on, but for constants of nodes to come.
        batches: feeds to run it on, all held.
        target: where it runs.
        until: names of values that are held, beyond what the model itself needs, until another is computed.
    """

    def __init__(
        self,
        model: ir.Model,
        batches: Iterable[Feeds],
        target: Target,
        *,
        until: Mapping[str, str] | None = None,
    ) -> None:
        self._model, self._target = model, target
        self._known: list[dict[str, Array]] = [
            {name: np.asarray(array) for name, array in feeds.items()} for feeds in batches
        ]
        nodes = list(model.graph)
        self._made = {value.name or "": at for at, node in enumerate(nodes) for value in node.outputs}
        self._last: dict[str, int] = {}
        for at, node in enumerate(nodes):
            for value in read_values(node):
                self._last[value.name or ""] = at
        for name, other in (until or {}).items():
            self._last[name] = max(self._last.get(name, -1), self._made[other])

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return len(self._known)

    @property
    def nbytes(self) -> int:
        """Bytes of the values that are held, of all batches."""
        return sum(array.nbytes for known in self._known for array in known.values())

    @property
    def held(self) -> tuple[str, ...]:
        """Names of the values that are held."""
        return tuple(self._known[0]) if self._known else ()

    def values(self, names: Sequence[str]) -> list[dict[str, Array]]:
        """Return the values named, one dict a batch. Ask in order of execution: what only earlier nodes read
        is forgotten.

        Raises:
            SessionError: a stretch does not run.
        """
        missing = [name for name in dict.fromkeys(names) if self._known and name not in self._known[0]]
        if missing:
            self._advance(missing)
        return [{name: known[name] for name in names} for known in self._known]

    def amend(self, name: str, arrays: Sequence[Array]) -> None:
        """Let what comes later read `arrays`, one a batch, as the value `name`, if it reads it at all."""
        for known, array in zip(self._known, arrays, strict=True):
            if name in known:
                known[name] = array

    def _advance(self, names: Sequence[str]) -> None:
        here = max(self._made[name] for name in names)
        known = self._known[0]
        live = [
            name
            for name, at in self._made.items()
            if name and at <= here < self._last.get(name, -1) and name not in known and name not in names
        ]
        wanted = [*names, *live]
        part = submodel(self._model, wanted, list(known))
        type_inputs(part, known)
        session = Session(part, self._target, optimization=Optimization.ALL)
        inputs = [value.name or "" for value in part.graph.inputs]
        for at, batch in enumerate(self._known):
            made = session.run({name: batch[name] for name in inputs})
            kept = {name: array for name, array in batch.items() if self._last.get(name, -1) > here}
            self._known[at] = kept | made
