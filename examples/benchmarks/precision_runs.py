# SPDX-License-Identifier: Apache-2.0
"""Plans by every signal for one model: what each signal costs, and what the model is worth with its plans."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import onnx_ir as ir

from splitfold.examples.benchmarks.precision_regimes import Regime
from splitfold.examples.benchmarks.report import open_bare, say
from splitfold.examples.benchmarks.weight_subjects import Subject as Model
from splitfold.passes.allocation import Allocation
from splitfold.passes.assign_precision import AssignPrecisionPass
from splitfold.passes.base import Context, Findings
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.carry_out import Carrying, carry_out
from splitfold.passes.expected_loss import ErrorModel, expected_losses
from splitfold.passes.legalize import LegalizePass
from splitfold.passes.plan import PrecisionPlan
from splitfold.passes.signals.baselines import Reversed
from splitfold.passes.signals.deviations import local_errors
from splitfold.passes.signals.signal import Basis, ByChoice, Scores, Signal, measured
from splitfold.passes.signals.subject import Subject, find_subject
from splitfold.passes.signals.table import SignalKind, make_signal
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.errors import SplitfoldError

__all__ = ["ALIKE", "FLOAT", "TIMES_LOCAL", "TURNED", "Entry", "Known", "Sample", "grid_entries", "words"]

FLOAT, CONTROLS, ALIKE = "fp32", "controls", "every layer alike"
TURNED, TIMES_LOCAL = ", reversed", " x local error"
UPSIDE_DOWN = (SignalKind.SENSITIVITY, SignalKind.RELEVANCE)
"""Signals that are put upside down too."""


@dataclass
class Entry:
    """What plans by one contender gave on one draw of calibration data.

    Attributes:
        values: by budget, what was measured by name; the first decides.
        seconds: of the processor, for the signal, and for the layers' errors where those enter.
        reason: why a budget is missing.
        bits: by budget, stored bits a weight of the plan.
    """

    values: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: float | None = None
    reason: str = ""
    bits: dict[str, float] = field(default_factory=dict)


Entries = dict[str, Entry]
"""By contender."""


@dataclass(frozen=True)
class Known(Signal):
    """Scores that were found already."""

    found: Scores

    @property
    def name(self) -> str:
        """See `Signal`."""
        return self.found.signal

    def scores(self, subject: Subject) -> Scores:
        """See `Signal`."""
        return self.found


@dataclass(eq=False)
class Sample:
    """One model in one regime with the calibration data of one seed.

    Attributes:
        model: what is measured.
        regime: what plans are made of.
        seed: draws the calibration data and the random numbers of signals.
        file: scratch file of the model with a plan.
    """

    model: Model
    regime: Regime
    seed: int
    file: Path
    carrying: Carrying = field(default_factory=Carrying)
    _values: dict[tuple[str, ...], dict[str, float]] = field(default_factory=dict)

    @cached_property
    def subject(self) -> Subject:
        """The layers and their choices."""
        model = ir.load(self.model.model)
        CanonicalizePass()(model)
        context = Context(calibration=Calibration.of(self.model.calibration(self.seed)))
        layers = AssignPrecisionPass().candidates(model, Findings())
        return find_subject(model, layers, self.regime.choices, context, self.carrying)

    @cached_property
    def local(self) -> tuple[ByChoice, float]:
        """The relative squared error of each layer's own output in each choice, and the seconds it took."""
        start = time.process_time()
        return local_errors(self.subject, "the benchmark"), time.process_time() - start

    def scores(self, signal: Signal) -> tuple[Scores, float]:
        """What a signal says, and the processor seconds of all threads: other load does not count."""
        subject, start = self.subject, time.process_time()
        return measured(signal, subject), time.process_time() - start

    def value(self, plan: PrecisionPlan) -> dict[str, float]:
        """What the model is worth with a plan; equal plans are measured once."""
        key = tuple(f"{name} {item}" for name, item in plan.precisions.items())
        if key not in self._values:
            made, context = self.subject.model.clone(), self.subject.context
            carry_out(made, plan.precisions, context, self.carrying, Findings())
            LegalizePass().run(made, context)
            ir.save(made, self.file)
            self._values[key] = self.model.measure(open_bare(self.file))
        return self._values[key]

    def entries(self, kind: SignalKind) -> Entries:
        """The contenders of one signal: alone, times the layers' own errors, and upside down."""
        try:
            scores, seconds = self.scores(make_signal(kind, seed=self.seed))
        except (SplitfoldError, ValueError) as error:
            say(f"{self.model.name}: {kind.value}: {error}")
            return {kind.value: Entry(reason=str(error))}
        found = dict(self._forms(kind.value, scores, seconds))
        if kind in UPSIDE_DOWN:
            turned, name = Reversed(Known(scores)).scores(self.subject), kind.value + TURNED
            found[name] = self._spent(name, self._allocation(turned), seconds)
        return found

    def _forms(self, name: str, scores: Scores, seconds: float) -> Iterator[tuple[str, Entry]]:
        yield name, self._spent(name, self._allocation(scores), seconds)
        if scores.basis is Basis.IMPORTANCE:
            local, spent = self.local
            times = {
                layer: {choice: scores.by_layer[layer] * error for choice, error in own.items()}
                for layer, own in local.items()
            }
            label = name + TIMES_LOCAL
            yield label, self._spent(label, Allocation(self.subject, scores, times), seconds + spent)

    def _allocation(self, scores: Scores) -> Allocation:
        """What a budget is spent on by these scores alone, an error of b bits being 4^-b."""
        losses = expected_losses(scores, self.subject, ErrorModel.BITS)
        return Allocation(self.subject, scores, losses)

    def _spent(self, name: str, allocation: Allocation, seconds: float) -> Entry:
        """Spend every budget."""
        entry = Entry(seconds=seconds)
        for budget, limit in self.regime.limits(self.subject).items():
            try:
                plan = allocation.within([limit])
            except SplitfoldError as error:
                entry.reason = str(error)
                continue
            entry.values[budget], entry.bits[budget] = self.value(plan), plan.weight_bits
            counts = ", ".join(f"{count} {item}" for item, count in plan.counts().items())
            say(
                f"{self.model.name}, seed {self.seed}, {budget}, {name}: {words(entry.values[budget])}; "
                f"{plan.weight_bits:.2f} bits stored; {counts}; {seconds:.2f} s"
            )
        return entry

    def controls(self) -> Entries:
        """What any importance has to beat, all layers of the same one; and one precision for all layers that
        can have it, whatever it costs."""
        alike = Scores(ALIKE, Basis.IMPORTANCE, {layer.name: 1.0 for layer in self.subject.layers})
        allocation = self._allocation(alike)
        found = {ALIKE: self._spent(ALIKE, allocation, 0.0)}
        for choice in self.regime.fixed:
            plan = allocation.uniform(choice)
            value = self.value(plan)
            label = f"{choice} everywhere, {plan.weight_bits:.2f} bits"
            found[label] = Entry(dict.fromkeys(self.regime.budgets, value))
            say(f"{self.model.name}, seed {self.seed}, {label}: {words(value)}")
        return found


def grid_entries(
    model: Model, regime: Regime, signals: Sequence[SignalKind], seeds: int, folder: Path
) -> list[Entries]:
    """All contenders, a mapping for each seed. What a file in `folder` holds is not measured again."""
    whole = model.measure(open_bare(model.model))
    say(f"{model.name}: fp32 {words(whole)}")
    found: list[Entries] = []
    for seed in range(seeds):
        file = folder / f"{model.name}-{regime.name}-{seed}.json".replace(" ", "-")
        done = _read(file)
        sample = Sample(model, regime, seed, folder / f"{model.name} {regime.name}.onnx".replace(" ", "-"))
        if CONTROLS not in done:
            done[CONTROLS] = sample.controls()
        for kind in signals:
            if kind.value not in done:
                done[kind.value] = sample.entries(kind)
                _write(file, done)
        sample.file.unlink(missing_ok=True)
        entries = {FLOAT: Entry(dict.fromkeys(regime.budgets, whole))}
        for key in (CONTROLS, *(kind.value for kind in signals)):
            entries |= done.get(key, {})
        found.append(entries)
    return found


def _read(file: Path) -> dict[str, Entries]:
    if not file.is_file():
        return {}
    raw = json.loads(file.read_text(encoding="utf-8"))
    return {key: {name: Entry(**entry) for name, entry in group.items()} for key, group in raw.items()}


def _write(file: Path, done: Mapping[str, Entries]) -> None:
    raw = {key: {name: asdict(entry) for name, entry in group.items()} for key, group in done.items()}
    file.write_text(json.dumps(raw, indent=1), encoding="utf-8")


def words(values: Mapping[str, float]) -> str:
    """Numbers by name."""
    return ", ".join(f"{what} {value:.4f}" for what, value in values.items())
