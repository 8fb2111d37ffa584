# SPDX-License-Identifier: Apache-2.0
"""Making a failing case small: fewer nodes, passes and batches, then random weights and inputs in place of
the user's, as long as it fails in the same way."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import onnx_ir as ir

from splitfold.compiler.debug.delta import minimize
from splitfold.compiler.debug.reproduce.case import Case, Signature, attempt
from splitfold.compiler.debug.reproduce.part import Whole
from splitfold.compiler.debug.reproduce.randomise import random_inputs, random_weights, weight_names
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.identity import layers_of
from splitfold.passes.pipeline import Pipeline
from splitfold.runtime.errors import CalibrationError, SessionError
from splitfold.runtime.model_file import weight_bytes

__all__ = ["Limits", "Reduced", "reduce"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_RADII = (0, 1, 2, 4, 8, 16)
"""Sizes of the neighbourhoods that are tried first, in steps along edges."""
_LEARNT_NODES = 64
"""Nodes of a part up to which all its values are captured at once."""


@dataclass(frozen=True)
class Limits:
    """Where a reduction ends.

    Attributes:
        seconds: no attempt is started after these; the one that runs is finished.
        attempts: compilations at most.
        weight_bytes: models with more bytes of weights are not tried, only parts of them.
        kept_bytes: a model that could not be reduced is written where it has no more bytes of weights.
    """

    seconds: float = 30.0
    attempts: int = 400
    weight_bytes: int = 300_000_000
    kept_bytes: int = 100_000_000


@dataclass(frozen=True)
class Reduced:
    """What a reduction came to.

    Attributes:
        case: the smallest case that was seen to fail in the same way, or None where none was.
        notes: what was reduced and what was replaced, for people.
        attempts: compilations tried.
        seconds: wall time.
        exhausted: whether a limit ended it.
        case_seconds: how long `case` took to fail.
    """

    case: Case | None
    notes: tuple[str, ...]
    attempts: int
    seconds: float
    exhausted: bool
    case_seconds: float


def reduce(
    starts: Sequence[Case], wanted: Signature, layers: Collection[str], limits: Limits | None = None
) -> Reduced:
    """Return the smallest case found that fails as `wanted`.

    Args:
        starts: cases that should fail, the simplest first; the first that does is reduced.
        wanted: how.
        layers: user-facing names of layers around which to look first.
        limits: bounds on the work.
    """
    search = _Search(wanted, limits or Limits())
    found = search.phase(0.5, lambda: any(_find(search, start, layers) for start in starts))
    if found:
        for share, shrink in _PHASES:
            search.phase(share, lambda shrink=shrink: shrink(search))  # type: ignore[misc]
    seconds = time.monotonic() - search.start
    return Reduced(
        search.best, tuple(search.notes), search.attempts, seconds, search.exhausted, search.best_seconds
    )


class _LimitError(Exception):
    """No further attempt may be made."""


@dataclass
class _Search:
    """Attempts so far, and the best case."""

    wanted: Signature
    limits: Limits
    best: Case | None = None
    notes: list[str] = field(default_factory=list)
    attempts: int = 0
    exhausted: bool = False
    start: float = field(default_factory=time.monotonic)
    share: float = 1.0
    needs_data: bool = False
    best_seconds: float = 0.0

    def phase(self, share: float, work: Callable[[], T]) -> T | None:
        """Do some work until `share` of the whole time has passed."""
        self.share = share
        try:
            return work()
        except _LimitError:
            self.exhausted = True
            return None

    def fails(self, case: Case) -> bool:
        """Whether `case` fails as wanted; it is the best one then."""
        late = time.monotonic() - self.start > self.limits.seconds * self.share
        if late or self.attempts >= self.limits.attempts:
            raise _LimitError
        if weight_bytes(case.model) > self.limits.weight_bytes:
            return False
        self.attempts += 1
        begun = time.monotonic()
        error = attempt(case)
        self.needs_data |= isinstance(error, CalibrationError)
        if error is None or Signature.of(error) != self.wanted:
            return False
        self.best, self.best_seconds = case, time.monotonic() - begun
        return True

    def current(self) -> Case:
        """Return the best case."""
        if self.best is None:
            raise ValueError("nothing was found yet")
        return self.best


def _find(search: _Search, start: Case, layers: Collection[str]) -> bool:
    """Look for a failing part of `start` around the nodes of `layers`, then at all of it."""
    whole = Whole(start)
    distances = _distances(whole.nodes, _seeds(whole.nodes, layers))
    tried = 0
    for radius in _RADII if distances else ():
        nodes = [node for node, distance in distances.items() if distance <= radius]
        if len(nodes) > tried and _fails_somehow(search, whole, nodes):
            return True
        tried = max(tried, len(nodes))
    if tried < len(whole.nodes) and _fails_somehow(search, whole, whole.nodes):
        return True
    return search.fails(start)


def _fails_somehow(search: _Search, whole: Whole, nodes: Collection[ir.Node]) -> bool:
    """Whether the part fails without calibration data, or else with it."""
    if not search.needs_data and search.fails(whole.part(nodes, calibrated=False)):
        return True
    return bool(whole.case.batches) and search.fails(whole.part(nodes))


def _seeds(nodes: Sequence[ir.Node], layers: Collection[str]) -> list[ir.Node]:
    """Return the nodes of the main graph that come from one of `layers`, or hold a subgraph that does."""
    return [node for node in nodes if any(set(layers) & set(layers_of(inner)) for inner in _inner(node))]


def _inner(node: ir.Node) -> Iterator[ir.Node]:
    yield node
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type is ir.AttributeType.GRAPH:
            yield from attribute.as_graph().all_nodes()
        elif attribute.type is ir.AttributeType.GRAPHS:
            for graph in attribute.as_graphs():
                yield from graph.all_nodes()


def _distances(nodes: Sequence[ir.Node], seeds: Sequence[ir.Node]) -> dict[ir.Node, int]:
    """Return the steps along edges, either way, from the nearest seed, for each node that can be reached."""
    inside, found = set(nodes), dict.fromkeys(seeds, 0)
    front = list(seeds)
    while front:
        near = [other for node in front for other in (*node.predecessors(), *node.successors())]
        step = found[front[0]] + 1
        front = [node for node in dict.fromkeys(near) if node in inside and node not in found]
        found |= dict.fromkeys(front, step)
    return found


def _fewer_nodes(search: _Search) -> None:
    whole = Whole(search.current())
    learnt = len(whole.nodes) + 1

    def fails(nodes: Collection[ir.Node]) -> bool:
        nonlocal learnt
        if not nodes or len(nodes) == len(whole.nodes):
            return bool(nodes)  # all of them were seen to fail
        if not search.fails(part := whole.part(nodes)):
            return False
        if len(nodes) <= _LEARNT_NODES < learnt:
            learnt = len(nodes)
            _learn(whole, part)
        return True

    if 1 < len(whole.nodes) <= _LEARNT_NODES:
        learnt = len(whole.nodes)
        _learn(whole, whole.case)
    minimize(whole.nodes, fails)


def _learn(whole: Whole, part: Case) -> None:
    try:
        whole.learn(part)
    except SessionError as error:
        logger.debug("values are captured one by one: %s", error)


def _fewer_passes(search: _Search) -> None:
    case = search.current()
    steps = case.steps.steps
    if len(steps) < 2:
        return

    def fails(places: Collection[int]) -> bool:
        kept = tuple(step for place, step in enumerate(steps) if place in places)
        return search.fails(dataclasses.replace(case, steps=Pipeline(kept or (CanonicalizePass(),))))

    minimize(range(len(steps))[::-1], fails)
    if len(search.current().steps) < len(steps):
        _fewer_nodes(search)


def _fewer_batches(search: _Search) -> None:
    case = search.current()
    for count in range(min(2, len(case.batches))):
        if search.fails(dataclasses.replace(case, batches=case.batches[:count])):
            return


def _random_weights(search: _Search) -> None:
    case = search.current()
    names = weight_names(case.model)
    if not names:
        return
    if search.fails(dataclasses.replace(case, model=random_weights(case.model, names))):
        search.notes.append("all weights are random numbers in place of the model's")
        return
    replaced = []
    for name in names if len(names) > 1 else ():
        now = search.current()
        if search.fails(dataclasses.replace(now, model=random_weights(now.model, [name]))):
            replaced.append(name)
    kept = [name for name in names if name not in replaced]
    search.notes.append(f"weights that are the model's own: {', '.join(kept)}")


def _random_inputs(search: _Search) -> None:
    case = search.current()
    if not case.feeds:
        return
    names = list(case.feeds)
    if search.fails(random_inputs(case, names)):
        search.notes.append("all inputs are random numbers in place of the captured ones")
        return
    single = names if len(names) > 1 else ()
    replaced = [name for name in single if search.fails(random_inputs(search.current(), [name]))]
    kept = [name for name in names if name not in replaced]
    search.notes.append(f"inputs that are captured ones: {', '.join(kept)}")


_PHASES: tuple[tuple[float, Callable[[_Search], None]], ...] = (
    (0.75, _fewer_nodes),
    (0.85, _fewer_passes),
    (0.9, _fewer_batches),
    (0.95, _random_weights),
    (1.0, _random_inputs),
)
"""What shrinks a case, in order, and the share of the time after which it ends."""
