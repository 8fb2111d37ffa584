# SPDX-License-Identifier: Apache-2.0
"""A part of a case as a case of its own: some nodes, fed with what the whole computes for them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence

import onnx_ir as ir

from splitfold.compiler.debug.reproduce.case import Case
from splitfold.passes.submodel import node_model, submodel
from splitfold.runtime.errors import SessionError, SplitfoldError
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.model_file import weight_bytes
from splitfold.runtime.session import Optimization, Session

__all__ = ["Whole"]

_HELD_BYTES = 512_000_000
"""Bytes of captured values; a part that needs more is fed with synthetic inputs."""
_SINGLE_VALUES = 32
"""Values that are tried one by one for a batch that the whole does not run with."""
_RUN_BYTES = 1_000_000_000
"""Bytes of weights above which the whole is not run for its values."""


class _TooLargeError(Exception):
    """Values are not captured: the model or they are too large."""


class Whole:
    """A case to take parts of.

    Values inside it are captured where a part needs them as inputs: on the example inputs, and on each batch
    of the calibration data. What was captured is kept.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.nodes: tuple[ir.Node, ...] = tuple(case.model.graph)
        self._runs: list[dict[str, Array]] = [dict(feeds) for feeds in (case.feeds or {}, *case.batches)]
        self._held = 0

    def part(self, nodes: Collection[ir.Node], *, calibrated: bool = True) -> Case:
        """Return the case of `nodes` alone; without calibration data where it is not `calibrated`.

        Where what they read cannot be captured, it has no feeds: `compile` then makes synthetic ones.
        """
        model = node_model(self.case.model, nodes)
        inputs = [value.name or "" for value in model.graph.inputs]
        try:
            runs = self._values(inputs, len(self._runs) if calibrated else 1)
        except (SplitfoldError, KeyError, _TooLargeError):
            return dataclasses.replace(self.case, model=model, feeds=None, batches=())
        _complete_types(model, runs[0])
        return dataclasses.replace(self.case, model=model, feeds=runs[0], batches=tuple(runs[1:]))

    def learn(self, part: Case) -> None:
        """Capture all values of `part`, a small one, by running it alone: parts of it then cost no run of the
        whole.

        Raises:
            SessionError: it does not run.
        """
        if part.feeds is None:
            return
        names = [value.name for node in part.model.graph for value in node.outputs if value.name]
        session = Session(part.model, part.target, optimization=Optimization.OFF, taps=names)
        for run, feeds in zip(self._runs, (part.feeds, *part.batches), strict=False):
            found = session.run(feeds, names)
            run.update({name: array for name, array in found.items() if name not in run})

    def _values(self, names: Sequence[str], count: int) -> list[Feeds]:
        self._capture(names, count)
        return [{name: run[name] for name in names} for run in self._runs[:count]]

    def _capture(self, names: Iterable[str], count: int) -> None:
        missing = [name for name in names if any(name not in run for run in self._runs[:count])]
        if not missing:
            return
        if weight_bytes(self.case.model) > _RUN_BYTES or self.case.feeds is None:
            raise _TooLargeError
        compute = self._computer(missing)
        for number, run in enumerate(self._runs[:count]):
            try:
                found = compute(run)
            except SessionError:
                if not number:
                    raise
                found = self._what_can_be(missing, run)
            self._held += sum(array.nbytes for array in found.values())
            if self._held > _HELD_BYTES:
                raise _TooLargeError
            run.update(found)

    def _computer(self, names: Sequence[str]) -> Callable[[Feeds], dict[str, Array]]:
        model = submodel(self.case.model, names)
        inputs = [value.name or "" for value in model.graph.inputs]
        session = Session(model, self.case.target, optimization=Optimization.OFF)
        return lambda run: session.run({name: run[name] for name in inputs})

    def _what_can_be(self, names: Sequence[str], run: Feeds) -> dict[str, Array]:
        """Return `names` of a batch that the whole does not run with: what it fails before is that of the
        example inputs."""
        found = {name: self._runs[0][name] for name in names}
        for name in names[:_SINGLE_VALUES]:
            with contextlib.suppress(SessionError):
                found |= self._computer([name])(run)
        return found


def _complete_types(model: ir.Model, feeds: Feeds) -> None:
    """Give inputs without type or rank those of their feeds: the runtime asks for them."""
    for value in model.graph.inputs:
        array = feeds[value.name or ""]
        if value.type is None and array.dtype != object:
            value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        if value.shape is None:
            value.shape = ir.Shape([None] * array.ndim)
