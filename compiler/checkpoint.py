# SPDX-License-Identifier: Apache-2.0
"""The model as it was before the pass that runs: for holding passes to their word, and for finding out what
went wrong."""

from __future__ import annotations

import onnx_ir as ir

from splitfold.passes.base import Pass
from splitfold.passes.errors import Failure, PassFailedError
from splitfold.passes.pipeline import PassRecord
from splitfold.runtime.digest import structure_digest
from splitfold.runtime.model_file import weight_bytes

__all__ = ["Checkpoint"]

_SERIALIZED_BELOW = 1_000_000_000


class Checkpoint:
    """Observer that keeps a copy of the model before each pass, and checks that passes are truthful about
    having changed it.

    The copy shares the weights. Give it first, so that what it holds is true when another observer raises.

    Attributes:
        step: the pass that ran last or is running, or None.
        before: the model before `step`.
        after: the model that `step` works on, as it stands now.
        done: text forms of the passes before `step`.
    """

    def __init__(self) -> None:
        self.step: Pass | None = None
        self.before: ir.Model | None = None
        self.after: ir.Model | None = None
        self.done: tuple[str, ...] = ()
        self._digest = ""
        self._moved = True

    def before_pass(self, step: Pass, model: ir.Model, index: int, total: int) -> None:
        """Copy the model."""
        self.done = (*self.done, str(self.step)) if index and self.step is not None else ()
        self.step, self.after = step, model
        if not index or not self._digest:
            self._digest = _digest(model)  # else it is known from the end of the pass before
        if not index or self._moved or self.before is None:
            self.before = model.clone()

    def after_pass(self, step: Pass, model: ir.Model, record: PassRecord) -> PassRecord:
        """Compare the model with the copy.

        Raises:
            PassFailedError: `record.modified` is not what happened, or nodes are out of order.
        """
        if fault := _order_fault(model):
            self._refuse(fault, Failure.INVALID)
        digest, before = _digest(model), self._digest
        self._digest, self._moved = digest, record.modified
        if digest != before and not record.modified:
            self._refuse("it says that it changed nothing, but the model has changed")
        if digest == before and record.modified and _same(self.before, model):
            self._refuse("it says that it changed the model, but nothing has changed")
        return record

    def _refuse(self, message: str, kind: Failure = Failure.UNTRUE) -> None:
        raise PassFailedError(message, failed=str(self.step), before=self.done, kind=kind)


def _order_fault(model: ir.Model) -> str:
    """Return which node stands before what it reads; such a model runs, but ONNX forbids it and it cannot be
    copied."""
    for graph in model.graphs():
        seen: set[ir.Node] = set()
        for node in graph:
            for value in node.inputs:
                made = value.producer() if value is not None else None
                if value is not None and made is not None and made.graph is graph and made not in seen:
                    return f"node '{node.name}' stands before the one that computes its input '{value.name}'"
            seen.add(node)
    return ""


def _digest(model: ir.Model) -> str:
    return f"{model.ir_version} {structure_digest(model)}"


def _same(before: ir.Model | None, after: ir.Model) -> bool:
    """Whether also what no structure digest looks at, such as documentation, is the same."""
    if before is None or weight_bytes(after) > _SERIALIZED_BELOW:
        return False
    texts = [ir.to_proto(model).SerializeToString(deterministic=True) for model in (before, after)]
    return bool(texts[0] == texts[1])
