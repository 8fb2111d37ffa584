# SPDX-License-Identifier: Apache-2.0
"""The activations of a model over calibration data, a few values at a time.

Asked in order of execution it walks once through the model, a stretch of it loaded at a time, the values
between two stretches held for all batches. Where these would take too much memory, or the order goes back, it
runs the part of the model that leads to the values over the data again, one batch held at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from splitfold.passes.submodel import submodel, type_inputs
from splitfold.passes.walk import Walk
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.errors import CalibrationError, SessionError
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.model_file import weight_bytes
from splitfold.runtime.session import Optimization, Session
from splitfold.runtime.target import Target

__all__ = ["ActivationStream", "holdable_bytes"]

logger = logging.getLogger(__name__)

_SHARE = 2
_AT_LEAST = 256 * 2**20

Use = Callable[[str, Array], None]


def holdable_bytes(model: ir.Model) -> int:
    """Return how many bytes of activations may be held between two stretches."""
    return max(_AT_LEAST, weight_bytes(model) // _SHARE)


class ActivationStream:
    """Computes named values of the main graph (graph inputs included) over all batches.

    Args:
        model: is not changed, and must not be while the stream is in use.
        calibration: read once, or once for each visit.
        target: where the model runs.
    """

    def __init__(self, model: ir.Model, calibration: Calibration, target: Target) -> None:
        self._model, self._calibration, self._target = model, calibration, target
        self._limit = holdable_bytes(model)
        self._defaults = _defaults(model)
        self._order = {value.name or "": -1 for value in model.graph.inputs}
        self._order |= {value.name or "": at for at, node in enumerate(model.graph) for value in node.outputs}
        self._here = -1
        self._walk = self._start()

    @property
    def walks(self) -> bool:
        """Whether it still walks through the model once; else each visit starts from the inputs."""
        return self._walk is not None

    def visit(self, names: Sequence[str], use: Use) -> None:
        """Call `use(name, array)` for each value named and each batch.

        Raises:
            CalibrationError: a batch does not fit, or the data is empty.
            SessionError: the part of the model that leads there cannot be run.
        """
        left = sorted(dict.fromkeys(names), key=self._order.__getitem__)
        while left and (arrays := self._walked(left[0])) is not None:
            for array in arrays:
                use(left[0], array)
            del left[0]
        if left:
            self._rerun(left, use)

    def _start(self) -> Walk | None:
        """Return a walk that holds all batches, or None where they are too large."""
        batches: list[Feeds] = []
        size = 0
        for feeds in self._calibration:
            batches.append(self._defaults | dict(feeds))
            size += sum(np.asarray(array).nbytes for array in feeds.values())
            if size > self._limit:
                logger.info("the calibration data takes more than %d bytes: it is read again", self._limit)
                return None
        if not batches:
            raise CalibrationError("the calibration data is empty: at least one batch is needed.")
        return Walk(self._model, batches, self._target)

    def _walked(self, name: str) -> list[Array] | None:
        """Return the arrays of one value, or None where the walk is over."""
        if self._walk is None or self._order[name] < self._here:
            self._walk = None
            return None
        try:
            found = [values[name] for values in self._walk.values([name])]
        except SessionError as error:  # a value between two stretches that is no array, say
            logger.info("no walk beyond '%s': %s", name, error)
            self._walk = None
            return None
        self._here = self._order[name]
        if self._walk.nbytes > self._limit:
            logger.info("more than %d bytes of activations at '%s': no walk beyond it", self._limit, name)
            self._walk = None
        return found

    def _rerun(self, names: Sequence[str], use: Use) -> None:
        given = {value.name for value in self._model.graph.inputs}
        computed = [name for name in names if name not in given]
        session: Session | None = None
        for batch in self._calibration:
            feeds = self._defaults | dict(batch)
            if computed and session is None:
                part = submodel(self._model, computed)
                type_inputs(part, feeds)
                session = Session(part, self._target, optimization=Optimization.ALL)
            found = {name: np.asarray(feeds[name]) for name in names if name in feeds}
            if session is not None:
                found |= session.run({name: feeds[name] for name in session.inputs if name in feeds})
            for name in names:
                use(name, found[name])


def _defaults(model: ir.Model) -> dict[str, Array]:
    """Return the arrays of graph inputs that a caller may leave out: a part of the model has no defaults."""
    held = {value.name or "": value.const_value for value in model.graph.inputs}
    return {name: tensor.numpy() for name, tensor in held.items() if tensor is not None}
