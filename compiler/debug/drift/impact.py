# SPDX-License-Identifier: Apache-2.0
"""What the local error of one value does to the reference's outputs, when nothing else is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from splitfold.compiler.debug.drift.cut import Cut
from splitfold.compiler.debug.drift.measure import Parts, feeds_of
from splitfold.compiler.debug.drift.padding import Padding
from splitfold.compiler.debug.drift.pairing import Pairing
from splitfold.compiler.debug.drift.slices import Slice, slice_model
from splitfold.compiler.debug.drift.sums import Sums
from splitfold.runtime.compare import Deviation, worst
from splitfold.runtime.errors import SessionError
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.target import Target

__all__ = ["Examine", "Exhibit", "Suspect", "question"]

_Values = dict[str, Array]


@dataclass(frozen=True)
class Suspect:
    """A value under question.

    Attributes:
        impact: deviation of the reference's worst output, in the worst case that the value is a source of;
            None where the reference has no comparable output.
        note: what the examination found.
    """

    impact: Deviation | None
    note: str


@dataclass(frozen=True)
class Exhibit:
    """A suspect on one batch.

    Attributes:
        name: the reference's value.
        expected: what it is there.
        given: what the compiled part makes of the reference's inputs.
        inside: values of the cut model: inputs of that part, and values inside it that were asked for.
    """

    name: str
    expected: Array
    given: Array
    inside: Mapping[str, Array]


Examine = Callable[[Exhibit], str]
"""Says what can be seen of the cause, in words; empty where nothing can."""


@dataclass
class _Case:
    """A run of the reference on one batch in which some values are what the compiled model's parts make of
    what those read there; none in the plain run."""

    sources: Sequence[str]
    batch: int
    held: _Values
    moved: bool = False
    failed: bool = False


@dataclass
class _Trial:
    """The runs of all cases through the slices of the reference, which end at the sources."""

    pair: Pairing
    cut: Cut
    locals: Mapping[str, Slice]
    target: Target
    batches: Sequence[Feeds]
    padding: Padding
    examine: Examine
    plain: list[_Case] = field(default_factory=list)
    cases: dict[str, list[_Case]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def run(self, cases: Mapping[str, Sequence[str]], stops: Sequence[str], outputs: Sequence[str]) -> None:
        """Run everything; `stops` are names of values at which a slice ends, in order."""
        wanted = [sorted({name, *self._needs(name)}) for name in stops]
        self.plain = [_Case((), index, dict(feeds)) for index, feeds in enumerate(self.batches)]
        self.cases = {
            key: [_Case(sources, index, dict(feeds)) for index, feeds in enumerate(self.batches)]
            for key, sources in cases.items()
        }
        slices = slice_model(self.pair.reference, [*wanted, list(outputs)], self.target)
        for name, part in zip([*stops, None], slices, strict=True):
            for case in self._all():
                self._advance(case, part)
            part.close()
            if name is not None and name in self.locals:
                self._inject(name)
            for case in self._all() if name is not None else ():
                case.held = {key: array for key, array in case.held.items() if key in part.after}

    def sums(self, key: str, outputs: Sequence[str]) -> dict[str, Sums]:
        """Return the distance of the outputs in a case from those of the plain run, over all batches."""
        found = {name: Sums() for name in outputs}
        for plain, case in zip(self.plain, self.cases[key], strict=True):
            for name in outputs:
                if case.failed:
                    found[name].broken = "the reference does not run with it"
                    continue
                expected, given = plain.held[name], case.held[name]
                if expected.shape == given.shape:
                    feeds = self.batches[case.batch]
                    expected, given = (self.padding.without(feeds, each) for each in (expected, given))
                found[name].add(expected, given)
        return found

    def _all(self) -> list[_Case]:
        return [*self.plain, *(case for cases in self.cases.values() for case in cases)]

    def _needs(self, name: str) -> set[str]:
        part = self.locals.get(name)
        return {self.cut.inputs[key] for key in part.given if key in self.cut.inputs} if part else set()

    def _advance(self, case: _Case, part: Slice) -> None:
        """Run one slice; where nothing that it reads has moved, its values are those of the plain run."""
        plain = self.plain[case.batch]
        if case.failed:
            return
        if case is not plain and all(case.held.get(name) is plain.held.get(name) for name in part.given):
            case.held |= {name: plain.held[name] for name in part.leaving}
            return
        try:
            case.held |= part.run({**self.batches[case.batch], **case.held})
        except SessionError:
            if case is plain:
                raise
            case.failed = True

    def _inject(self, name: str) -> None:
        """Replace a value, in the cases that it is a source of, by what the compiled part makes."""
        for plain in self.plain:
            expected = plain.held[name]
            fed, made = self._made(name, plain)
            given = made[self.cut.outputs[name]]
            if plain.batch == 0:
                self.notes[name] = self.examine(Exhibit(name, expected, given, {**fed, **made}))
            for case in (cases[plain.batch] for cases in self.cases.values()):
                if name in case.sources and not case.failed:
                    self._replace(name, case, given)
        self.locals[name].close()

    def _replace(self, name: str, case: _Case, given: Array) -> None:
        dtype = self.plain[case.batch].held[name].dtype
        try:
            if case.moved:
                given = self._made(name, case)[1][self.cut.outputs[name]]
        except SessionError:
            case.failed = True
            return
        case.held[name] = given.astype(dtype, copy=False)
        case.moved = True

    def _made(self, name: str, case: _Case) -> tuple[_Values, _Values]:
        """Return what the compiled part of a value is fed with in a case, and what it gives."""
        part = self.locals[name]
        fed = feeds_of(part, self.cut, {**self.batches[case.batch], **case.held})
        return fed, part.run(fed)


def question(
    pair: Pairing,
    cut: Cut,
    parts: Parts,
    cases: Mapping[str, Sequence[str]],
    inside: Callable[[str], Sequence[str]],
    batches: Sequence[Feeds],
    target: Target,
    padding: Padding,
    examine: Examine,
) -> dict[str, Suspect]:
    """Return what the local error of each source does, over a few batches.

    The reference runs in slices that end at the sources; in each case only what lies behind its first source
    is run again.

    Args:
        pair: the models.
        cut: the compiled one, cut open.
        parts: the slices of the measurement, which bound the weights opened at once.
        cases: values of the reference that carry their local errors together, by any name.
        inside: gives the names of values inside the part of a source that `examine` is to be shown.
        batches: feeds; all of them are held, with the values between slices.
        target: where they run.
        padding: which positions do not count.
        examine: is shown each source on the first batch.
    """
    sources = {name for names in cases.values() for name in names}
    order = [value.name or "" for node in pair.reference.graph for value in node.outputs]
    ends = {run[-1] for run in parts.names[:-1]}
    stops = [name for name in order if name in sources or name in ends]
    outputs = [value.name or "" for value in pair.reference.graph.outputs if value.name in set(order)]
    asked = {name: [cut.outputs[name], *inside(name)] for name in sources}
    local = {name: slice_model(cut.model, [names], target)[0] for name, names in asked.items()}
    trial = _Trial(pair, cut, local, target, batches, padding, examine)
    trial.run(cases, stops, outputs)
    found: dict[str, list[Deviation]] = {name: [] for name in sources}
    for key, names in cases.items():
        far = worst({name: item.deviation() for name, item in trial.sums(key, outputs).items()})
        if far is not None:
            for name in names:
                found[name].append(far[1])
    return {
        name: Suspect(min(found[name], key=lambda item: item.sqnr_db, default=None), trial.notes[name])
        for name in sources
    }
