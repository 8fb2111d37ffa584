# SPDX-License-Identifier: Apache-2.0
"""What a pass is: a frozen dataclass over `onnx_ir.passes.InPlacePass` whose fields are its options, and that
says what it did."""

from __future__ import annotations

import abc
import enum
import fnmatch
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from splitfold.passes.branches import layer_pattern
from splitfold.passes.errors import Failure, PassFailedError, SpecError
from splitfold.passes.plan import PrecisionPlan
from splitfold.passes.values import forget_names, import_domains
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.errors import did_you_mean
from splitfold.runtime.target import Target

__all__ = ["Context", "Contract", "Findings", "LayerPass", "Outcome", "Pass", "Require"]


class Contract(enum.Enum):
    """What a pass promises about the model's outputs."""

    EXACT = "exact"
    """Equal up to float re-association; checked numerically after the pass, always."""
    LOSSY = "lossy"
    """They move; the movement is measured and recorded."""
    SEMANTIC = "semantic"
    """A different function on purpose, to be trained."""


class Require(enum.Enum):
    """How much a pass must apply; less is `PassFailedError`."""

    NONE = "none"
    SOME = "some"
    ALL = "all"


@dataclass(frozen=True)
class Context:
    """What a pass may know beyond the model.

    Attributes:
        target: where the artifact is to run.
        calibration: representative inputs of the *original* model's signature, or None.
    """

    target: Target = field(default_factory=Target.cpu)
    calibration: Calibration | None = None


@dataclass
class Findings:
    """What a pass saw: collected while it runs.

    Attributes:
        applied: (layer, what was done) in order.
        skipped: (layer, reason) of each candidate that was left as it is.
        notes: facts about the whole, such as counts, bytes and bits.
        carried: by layer, names of the low-bit weights that a kernel of the target must be seen to read.
        missed: (layer, pattern, reason) of each place that a pattern of the pass nearly fitted; it was no
            candidate, so nobody was promised anything.
        measured: by layer, the SQNR in dB of its own low-bit output, taken or not, on the float model's
            activations.
        plan: the plan of precisions that was carried out, where the pass makes or reads one.
    """

    applied: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    carried: dict[str, list[str]] = field(default_factory=dict)
    missed: list[tuple[str, str, str]] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)
    plan: PrecisionPlan | None = None

    def apply(self, layer: str, what: str, *, weight: str | None = None) -> None:
        """Record that `what` was done to `layer`; `weight` is the low-bit initializer it now reads."""
        self.applied.append((layer, what))
        if weight is not None:
            self.carried.setdefault(layer, []).append(weight)

    def skip(self, layer: str, reason: str) -> None:
        """Record why the candidate `layer` was left as it is."""
        self.skipped.append((layer, reason))

    def miss(self, layer: str, pattern: str, reason: str) -> None:
        """Record why `pattern` nearly fitted `layer`, and did not."""
        if (layer, pattern, reason) not in self.missed:
            self.missed.append((layer, pattern, reason))

    def counts(self) -> dict[str, int]:
        """Return how often each thing was done."""
        return dict(Counter(what for _, what in self.applied))


@dataclass
class Outcome(ir.passes.PassResult):
    """The result of a pass: the model, whether it was modified, and the findings."""

    findings: Findings = field(default_factory=Findings)


@dataclass(frozen=True)
class Pass(ir.passes.InPlacePass, abc.ABC):
    """A graph rewrite.

    A concrete pass declares its `name` (text form, ``verb-noun``), its `contract`, its options as fields, and
    `rewrite`. It may assume a valid model and must leave a valid one, keeps no state between calls, is
    idempotent, and reports `modified` truthfully.

    Args:
        require: how much must be applied; less is an error.
    """

    name: ClassVar[str]
    contract: ClassVar[Contract]
    takes: ClassVar[str] = ""
    """What it takes up, in words, for those who ask why it left a layer alone."""
    require: Require = field(default=Require.NONE, kw_only=True)

    @abc.abstractmethod
    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """Change `model` in place, record what was done in `findings`, and return whether it changed."""

    def call(self, model: ir.Model) -> Outcome:
        """Run without calibration data, for the CPU target; see `run`."""
        return self.run(model, Context())

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Run the pass.

        Raises:
            PassFailedError: less was applied than `require` demands.
        """
        findings = Findings()
        forget_names(model)
        modified = self.rewrite(model, context, findings)
        import_domains(model)
        self._check_required(findings)
        return Outcome(model, modified, findings)

    def _check_required(self, findings: Findings) -> None:
        reasons = (
            "; ".join(f"{layer}: {reason}" for layer, reason in findings.skipped[:5])
            or "no candidate was found"
        )
        if self.require is Require.SOME and not findings.applied:
            raise PassFailedError(
                f"nothing was applied ({reasons})", failed=str(self), kind=Failure.NOT_APPLIED
            )
        if self.require is Require.ALL and (findings.skipped or not findings.applied):
            raise PassFailedError(
                f"{len(findings.skipped)} candidates were skipped ({reasons})",
                failed=str(self),
                kind=Failure.NOT_APPLIED,
            )

    def __str__(self) -> str:
        from splitfold.passes.spec import pass_text

        return pass_text(self)


@dataclass(frozen=True)
class LayerPass(Pass):
    """A pass that works layer by layer and can be told which ones.

    Args:
        only: layer patterns (shell wildcards); empty is every layer. ``layer:part`` is one part of a layer.
        exclude: layer patterns that are left alone, and recorded as such.
    """

    only: tuple[str, ...] = field(default=(), kw_only=True)
    exclude: tuple[str, ...] = field(default=(), kw_only=True)

    def unwanted(self, *names: str) -> str | None:
        """Return the reason why the user does not want a layer of these names (its own, those of its part)
        touched, or None."""
        if any(_matches(name, pattern) for name in names for pattern in self.exclude):
            return "excluded by option"
        if self.only and not any(_matches(name, pattern) for name in names for pattern in self.only):
            return "not among the layers asked for"
        return None

    def check_patterns(self, layers: Iterable[str]) -> None:
        """Raise `SpecError` for a pattern that matches none of `layers`.

        ``layer:part`` may find no part, as measurement decides which layers are split; its layer must exist.
        """
        known = sorted(set(layers))
        for pattern in (*self.only, *self.exclude):
            wanted = (pattern, layer_pattern(pattern))
            if not any(_matches(layer, text) for layer in known for text in wanted):
                raise SpecError(f"{self.name}: no layer matches '{pattern}'.{did_you_mean(pattern, known)}")


def _matches(layer: str, pattern: str) -> bool:
    return layer == pattern or re.match(fnmatch.translate(pattern), layer) is not None
