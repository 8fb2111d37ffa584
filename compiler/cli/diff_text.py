# SPDX-License-Identifier: Apache-2.0
"""The difference of two models as text: equal changes of several layers are told once."""

from __future__ import annotations

import enum
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text

from splitfold.compiler.debug.diff.types import (
    Aspect,
    Detail,
    Kind,
    LayerChange,
    NodeChange,
    NodeFacts,
    TensorChange,
    TensorFacts,
)

__all__ = ["layer_texts"]

_SHOWN = 60
"""Layers (or groups of them) that are printed where not all are asked for."""
_STYLES = {Kind.ADDED: "green", Kind.REMOVED: "red"}
_DIGITS = re.compile(r"\d+")


class _Join(enum.Enum):
    """What is written of a number that several layers have."""

    SPAN = "both ends"
    LEAST = "the smallest"
    MOST = "the largest"


@dataclass(frozen=True)
class _Number:
    value: float
    form: str
    join: _Join = _Join.SPAN


@dataclass(frozen=True)
class _Line:
    """One line of a layer.

    Attributes:
        kind: of change: its colour.
        form: the text, with ``{}`` for each number.
        numbers: what is measured.
        pattern: what is equal in layers whose changes are told together: `form` without digits of names.
    """

    kind: Kind
    form: str
    numbers: tuple[_Number, ...] = ()
    pattern: str = ""

    @property
    def key(self) -> str:
        return self.pattern or self.form


def layer_texts(layers: Sequence[LayerChange], *, verbose: bool) -> Iterator[Text]:
    """Yield the lines of all layers; `verbose` tells each layer by itself, with names."""
    groups: defaultdict[tuple[object, ...], list[tuple[str, list[_Line]]]] = defaultdict(list)
    for change in layers:
        lines = list(_lines(change, verbose))
        same = (_starred(change.layer), *(line.key for line in lines))
        groups[(change.layer,) if verbose else same].append((change.layer, lines))
    shown = list(groups.values()) if verbose else list(groups.values())[:_SHOWN]
    for members in shown:
        yield from _group(members)
    left = list(groups.values())[len(shown) :]
    if left:
        yield Text(f"and {sum(map(len, left))} more layers: -v shows all, --layer PATTERN some of them")


def _group(members: Sequence[tuple[str, list[_Line]]]) -> Iterator[Text]:
    _, lines = members[0]
    many = len(members) > 1
    title = Text(_joined([name for name, _ in members]), style="bold")
    yield title.append(f"  ({len(members)} layers)", style="dim") if many else title
    for position, line in enumerate(lines):
        columns = zip(*(held[position].numbers for _, held in members), strict=True)
        form = line.key if many else line.form
        text = form.format(*(_span(column) for column in columns))
        yield Text(f"  {text}", style=_STYLES.get(line.kind, "yellow"))


def _span(column: Sequence[_Number]) -> str:
    low, high = (format(end(n.value for n in column), column[0].form) for end in (min, max))
    if low == high or column[0].join is _Join.LEAST:
        return low
    return high if column[0].join is _Join.MOST else f"{low} to {high}"


def _joined(names: Sequence[str]) -> str:
    """Return names that differ in their numbers as one: ``layer.{0-3,5}.dense``, or ``layer.*.conv*`` where
    more than one differs."""
    columns = list(zip(*(_DIGITS.findall(name) for name in names), strict=True))
    varying = [at for at, column in enumerate(columns) if len(set(column)) > 1]
    parts = _DIGITS.split(names[0])
    filled = [
        column[0] if at not in varying else "*" if len(varying) > 1 else f"{{{_runs(map(int, column))}}}"
        for at, column in enumerate(columns)
    ]
    return "".join(text for pair in zip(parts, [*filled, ""], strict=True) for text in pair)


def _runs(numbers: Iterable[int]) -> str:
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in found)


def _starred(name: str) -> str:
    return _DIGITS.sub("*", name)


def _braced(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _lines(change: LayerChange, verbose: bool) -> Iterator[_Line]:
    yield from _node_lines(change.nodes, verbose)
    yield from _tensor_lines(change.tensors, verbose)


def _node_lines(changes: Sequence[NodeChange], verbose: bool) -> Iterator[_Line]:
    replaced = [change for change in changes if change.kind is Kind.REPLACED]
    texts = [f"{_chain(change.before, verbose)} -> {_chain(change.after, verbose)}" for change in replaced]
    yield from (_Line(Kind.REPLACED, _braced(text)) for text in _counted(texts))
    for kind, sign in ((Kind.REMOVED, "-"), (Kind.ADDED, "+")):
        for folded in (False, True):
            nodes = [c for c in changes if c.kind is kind and c.folded is folded]
            operators = [_chain(change.before or change.after, verbose) for change in nodes]
            if operators:
                end = " (a constant now)" if folded else ""
                yield _Line(kind, _braced(f"{sign} {', '.join(_counted(operators))}{end}"))
    details = [(change, detail) for change in changes for detail in change.details]
    texts = [f"{_chain(change.after, verbose)}: {_detail(detail)}" for change, detail in details]
    for text in _counted(texts):
        yield _Line(Kind.CHANGED, _braced(text), pattern=_braced(text))


def _counted(texts: Iterable[str]) -> list[str]:
    return [text if count == 1 else f"{count} x {text}" for text, count in Counter(texts).items()]


def _chain(nodes: Sequence[NodeFacts], verbose: bool) -> str:
    return " + ".join(
        f"{node.operator} ({', '.join(filter(None, node.outputs))})" if verbose else node.operator
        for node in nodes
    )


def _detail(detail: Detail) -> str:
    if detail.aspect is Aspect.INPUT:
        return f"input {detail.name} read {detail.before or 'nothing'}, reads {detail.after or 'nothing'}"
    what = f"output {detail.name}" if detail.aspect is Aspect.OUTPUT_TYPE else detail.name
    return f"{what} {detail.before or '(none)'} -> {detail.after or '(none)'}"


def _tensor_lines(changes: Sequence[TensorChange], verbose: bool) -> Iterator[_Line]:
    for change in changes:
        if change.before is not None and change.after is not None:
            yield _moved(change, change.before, change.after, verbose)
    for kind, sign in ((Kind.REMOVED, "-"), (Kind.ADDED, "+")):
        facts = [change.before or change.after for change in changes if change.kind is kind]
        if not facts:
            continue
        texts = [_tensor(held, named=verbose) for held in facts if held is not None]
        yield _Line(kind, _braced(f"{sign} initializers: {', '.join(_counted(texts))}"))


def _moved(change: TensorChange, before: TensorFacts, after: TensorFacts, verbose: bool) -> _Line:
    """Return the line of an initializer that both models have."""
    named = verbose or not change.role
    first = f"{change.role} " if change.role else ""
    if change.kind is Kind.RETYPED:
        second = f" -> {_tensor(after, named=named and after.name != before.name)}"
    else:
        second = f" -> {after.name}" if named and after.name != before.name else ""
    head = f"{first}{_tensor(before, named=named)}{second}"
    forms, numbers = _measures(change)
    tail = "".join(f", {form}" for form in [*forms, *([_braced(change.note)] if change.note else [])])
    pattern = head
    for name in (before.name, after.name) if named else ():
        pattern = pattern.replace(name, _starred(name))
    return _Line(change.kind, _braced(head) + tail, numbers, _braced(pattern) + tail)


def _measures(change: TensorChange) -> tuple[list[str], tuple[_Number, ...]]:
    moved = change.moved
    if moved is None:
        return [], ()
    forms: list[str] = []
    numbers: list[_Number] = []
    if moved.rescaled is not None:
        forms.append(f"times {{}}..{{}} by {moved.rescaled.channels} channel")
        numbers.append(_Number(moved.rescaled.low, ".3g", _Join.LEAST))
        numbers.append(_Number(moved.rescaled.high, ".3g", _Join.MOST))
    if moved.max_abs == 0:
        return [*forms, "equal values"], tuple(numbers)
    forms.append("SQNR {} dB, max abs {}, relative {}")
    measured = ((moved.sqnr_db, ".1f"), (moved.max_abs, ".2g"), (moved.relative, ".2g"))
    return forms, (*numbers, *(_Number(value, form) for value, form in measured))


def _tensor(facts: TensorFacts, *, named: bool) -> str:
    sizes = f"[{','.join(map(str, facts.shape))}]" if facts.shape else ""
    text = f"{facts.dtype}{sizes}{f' ({facts.form})' if facts.form else ''}"
    return f"{facts.name} {text}" if named else text
