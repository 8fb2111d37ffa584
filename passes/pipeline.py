# SPDX-License-Identifier: Apache-2.0
"""A pipeline: an ordered tuple of passes, a Python value with a text form; running it leaves a record of each
pass."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import onnx_ir as ir

from splitfold.passes.base import Context, Pass
from splitfold.passes.errors import PassFailedError
from splitfold.passes.identity import inherit_missing
from splitfold.passes.plan import PrecisionPlan
from splitfold.passes.spec import parse_pass, split_top_level
from splitfold.passes.table import PASSES
from splitfold.runtime.compare import Deviation
from splitfold.runtime.errors import SessionError, SplitfoldError
from splitfold.runtime.model_file import weight_bytes

__all__ = ["Observer", "PassRecord", "Pipeline"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassRecord:
    """What one pass did.

    Attributes:
        text: text form of the pass.
        contract: what it promises: exact, lossy or semantic.
        modified: whether it changed the model.
        nodes_before, nodes_after: node counts, subgraphs included.
        bytes_before, bytes_after: bytes of all initializers.
        applied: (layer, what was done).
        skipped: (layer, reason) of each candidate left as it was.
        notes: facts about the whole.
        carried: low-bit weight names by layer.
        missed: (layer, pattern, reason) of each near miss.
        measured: local SQNR in dB by layer, where the pass measured it.
        plan: the plan of precisions that was carried out, where the pass makes or reads one.
        seconds: wall time; not part of the manifest, which must be the same for the same input.
        deviation: outputs after the pass against those before it, the worst output; None where it was not
            measured.
    """

    text: str
    contract: str
    modified: bool
    nodes_before: int
    nodes_after: int
    bytes_before: int
    bytes_after: int
    applied: tuple[tuple[str, str], ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    carried: dict[str, list[str]] = field(default_factory=dict)
    missed: tuple[tuple[str, str, str], ...] = ()
    measured: dict[str, float] = field(default_factory=dict)
    plan: PrecisionPlan | None = None
    seconds: float = 0.0
    deviation: Deviation | None = None


class Observer(Protocol):
    """Is told of each pass: for progress, snapshots, verification and timing.

    An observer may return a changed record (a verifier adds the deviation). It must not change the model.
    """

    def before_pass(self, step: Pass, model: ir.Model, index: int, total: int) -> None:
        """Is called with the model before `step`, the `index`-th of `total`, from 0; a compilation that
        repairs itself starts again at 0."""

    def after_pass(self, step: Pass, model: ir.Model, record: PassRecord) -> PassRecord:
        """Is called with the model after `step`; returns the record to keep."""


@dataclass(frozen=True)
class Pipeline:
    """An ordered tuple of passes.

    `Pipeline.parse` and `str` are inverse: the text form serves the command line, recipes, manifests and
    messages.
    """

    steps: tuple[Pass, ...] = ()

    @staticmethod
    def of(*steps: Pass) -> Pipeline:
        """Return the pipeline of these passes."""
        return Pipeline(steps)

    @staticmethod
    def parse(text: str, table: Sequence[type[Pass]] = PASSES) -> Pipeline:
        """Parse ``name{option=value,...},name,...``.

        Raises:
            SpecError: the text names an unknown pass or option, or a value of the wrong type.
        """
        return Pipeline(tuple(parse_pass(part, table) for part in split_top_level(text)))

    def __str__(self) -> str:
        return ",".join(str(step) for step in self.steps)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __add__(self, other: Pipeline) -> Pipeline:
        return Pipeline(self.steps + other.steps)

    def run(
        self, model: ir.Model, context: Context | None = None, observers: Sequence[Observer] = ()
    ) -> list[PassRecord]:
        """Run all passes over `model`, in place, and return their records.

        Raises:
            PassFailedError: a pass raised something unexpected, the runtime failed inside it, or it broke its
                word; it names the passes that ran before.
            SplitfoldError: an expected error of a pass, as it is.
        """
        records: list[PassRecord] = []
        for index, step in enumerate(self.steps):
            for observer in observers:
                observer.before_pass(step, model, index, len(self.steps))
            record = _run_one(step, model, context or Context(), tuple(record.text for record in records))
            for observer in observers:
                record = observer.after_pass(step, model, record)
            logger.info(
                "%s: %d applied, %d skipped, %.2f s",
                record.text,
                len(record.applied),
                len(record.skipped),
                record.seconds,
            )
            records.append(record)
        return records


def _run_one(step: Pass, model: ir.Model, context: Context, before: tuple[str, ...]) -> PassRecord:
    nodes, size, start = _count(model), weight_bytes(model), time.perf_counter()
    try:
        outcome = step.run(model, context)
    except SessionError as error:
        raise PassFailedError(str(error), failed=str(step), before=before) from error
    except SplitfoldError:
        raise
    except Exception as error:
        raise PassFailedError(f"{type(error).__name__}: {error}", failed=str(step), before=before) from error
    if orphans := inherit_missing(model):
        logger.debug("%s left %d nodes without a layer, such as %s", step, len(orphans), orphans[0].name)
    findings = outcome.findings
    return PassRecord(
        text=str(step),
        contract=step.contract.value,
        modified=outcome.modified,
        nodes_before=nodes,
        nodes_after=_count(model),
        bytes_before=size,
        bytes_after=weight_bytes(model),
        applied=tuple(findings.applied),
        skipped=tuple(findings.skipped),
        notes=tuple(findings.notes),
        carried=dict(findings.carried),
        missed=tuple(findings.missed),
        measured=dict(findings.measured),
        plan=findings.plan,
        seconds=time.perf_counter() - start,
    )


def _count(model: ir.Model) -> int:
    return sum(len(graph) for graph in model.graphs())
