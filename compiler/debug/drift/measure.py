# SPDX-License-Identifier: Apache-2.0
"""The sums of accumulated and local errors of all values, over all batches, slice by slice."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from splitfold.compiler.debug.drift.cut import Cut
from splitfold.compiler.debug.drift.padding import Padding
from splitfold.compiler.debug.drift.pairing import Pairing
from splitfold.compiler.debug.drift.probe import Seen
from splitfold.compiler.debug.drift.slices import Slice, halves, partition, slice_model
from splitfold.compiler.debug.drift.sums import Sums
from splitfold.runtime.errors import SessionError
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.model_file import weight_bytes
from splitfold.runtime.target import Target

__all__ = ["Measured", "Parts", "feeds_of", "measure", "slice_pair"]

logger = logging.getLogger(__name__)

_SIDES = 3
"""A slice is in memory three times: the reference's, the compiled model's, and that of the cut one."""


@dataclass
class Measured:
    """What the runs gave.

    Attributes:
        accumulated, local: sums by the reference's value; a local one that could not be run is missing.
        outputs: sums by output.
        batches: how many were run.
        slices: parts in which the models were run.
        peak: most bytes of values held at once, the batches themselves included.
    """

    accumulated: dict[str, Sums] = field(default_factory=dict)
    local: dict[str, Sums] = field(default_factory=dict)
    outputs: dict[str, Sums] = field(default_factory=dict)
    batches: int = 0
    slices: int = 0
    peak: int = 0


@dataclass(frozen=True)
class Parts:
    """The three models in matching slices.

    Attributes:
        names: the reference's values that each slice measures.
        reference, actual: the slices of the models.
        local: those of the cut one, which share no values; several where one does not run as a whole.
    """

    names: tuple[tuple[str, ...], ...]
    reference: tuple[Slice, ...]
    actual: tuple[Slice, ...]
    local: list[list[Slice]]


def slice_pair(
    pair: Pairing, cut: Cut, points: Sequence[str], seen: Mapping[str, Seen], target: Target, limit: int
) -> Parts:
    """Return both models and the cut one in slices of at most `limit` bytes of weights and values."""
    sizes = {name: seen[name].nbytes for name in points}
    runs = partition(pair.reference, points, limit // _SIDES, sizes)
    local = [slice_model(cut.model, [[cut.outputs[name] for name in run]], target)[0] for run in runs]
    needed = [{cut.inputs[name] for name in part.given if name in cut.inputs} for part in local]
    outputs = [value.name or "" for value in pair.reference.graph.outputs]
    computed = {value.name for node in pair.reference.graph for value in node.outputs}
    outputs = [name for name in outputs if name in computed]
    there = [[pair.counterparts[name][-1] for name in run] for run in runs]
    wanted = [sorted({*run, *needs}) for run, needs in zip(runs, needed, strict=True)]
    wanted[-1] = sorted({*wanted[-1], *outputs})
    there[-1] = sorted({*there[-1], *outputs})
    return Parts(
        tuple(map(tuple, runs)),
        tuple(slice_model(pair.reference, wanted, target)),
        tuple(slice_model(pair.actual, there, target)),
        [[part] for part in local],
    )


def feeds_of(part: Slice, cut: Cut, reference: Mapping[str, Array]) -> dict[str, Array]:
    """Return the feeds of a slice of the cut model: the reference's values (and the model's inputs), in the
    types of the compiled one's."""
    found = {}
    for name in part.given:
        array = reference[cut.inputs.get(name, name)]
        found[name] = _cast(array, cut.types[name].dtype) if name in cut.types else array
    return found


def _cast(array: Array, dtype: np.dtype[Any]) -> Array:
    """Return `array` in another type; what stands for minus infinity stays finite in half precision."""
    if dtype == np.float16 and array.dtype.kind == "f" and array.dtype != dtype:
        limits = np.finfo(np.float16)
        array = np.where(np.isinf(array), array, np.clip(array, limits.min, limits.max))
    return array.astype(dtype, copy=False)


@dataclass
class _Runs:
    """The loops over slices and batches."""

    parts: Parts
    pair: Pairing
    cut: Cut
    padding: Padding
    found: Measured
    stays_open: bool

    def walk(self, group: Sequence[Feeds]) -> int:
        """Run all slices, each over all batches of `group`; return the most bytes carried between slices."""
        carried = 0
        reference: list[dict[str, Array]] = [dict(feeds) for feeds in group]
        actual: list[dict[str, Array]] = [dict(feeds) for feeds in group]
        last = len(self.parts.names) - 1
        for index in range(last + 1):
            for number, feeds in enumerate(group):
                r, a = self._run(index, {**feeds, **reference[number]}, {**feeds, **actual[number]})
                self._count([*reference, *actual, r, a])
                if index == last:
                    self._add(feeds, self.found.outputs, r, a, {name: name for name in self.found.outputs})
                reference[number] = _kept(r, self.parts.reference[index].after)
                actual[number] = _kept(a, self.parts.actual[index].after)
            carried = max(carried, _bytes([*reference, *actual]))
            if not self.stays_open:
                self.close(index)
        return carried

    def close(self, index: int) -> None:
        for part in (self.parts.reference[index], self.parts.actual[index], *self.parts.local[index]):
            part.close()

    def _run(
        self, index: int, reference: dict[str, Array], actual: dict[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return the values of both models after slice `index`, having added its errors to the sums."""
        r = reference | self.parts.reference[index].run(reference)
        a = actual | self.parts.actual[index].run(actual)
        names = self.parts.names[index]
        there = {name: self.pair.counterparts[name][-1] for name in names}
        self._add(reference, self.found.accumulated, r, a, there)
        local = self._local(index, r)
        made = {name: self.cut.outputs[name] for name in names if self.cut.outputs[name] in local}
        for name in names:
            if name not in made:
                self.found.local.pop(name, None)
        self._add(reference, self.found.local, r, local, made)
        return r, a

    def _add(
        self,
        feeds: Feeds,
        sums: Mapping[str, Sums],
        reference: Mapping[str, Array],
        actual: Mapping[str, Array],
        names: Mapping[str, str],
    ) -> None:
        for here, there in names.items():
            first, second = reference[here], actual[there]
            if first.shape == second.shape:
                first, second = self.padding.without(feeds, first), self.padding.without(feeds, second)
            sums[here].add(first, second)

    def _local(self, index: int, reference: Mapping[str, Array]) -> dict[str, Array]:
        """Return the values of the cut model; one that does not run is halved, down to what fails alone."""
        found: dict[str, Array] = {}
        pending = self.parts.local[index]
        self.parts.local[index] = []
        while pending:
            part = pending.pop(0)
            try:
                found |= part.run(feeds_of(part, self.cut, reference))
                self.parts.local[index].append(part)
            except SessionError as error:
                if len(part.wanted) == 1:
                    logger.warning("the local error of '%s' is not measured: %s", part.wanted[0], error)
                pending = [*halves(part), *pending]
        self._count([reference, found])
        return found

    def _count(self, held: Iterable[Mapping[str, Array]]) -> None:
        self.found.peak = max(self.found.peak, _bytes(held))


def _kept(values: Mapping[str, Array], names: frozenset[str]) -> dict[str, Array]:
    return {name: array for name, array in values.items() if name in names}


def _bytes(held: Iterable[Mapping[str, Array]]) -> int:
    """Return the bytes of all arrays in `held`, each counted once."""
    arrays = {id(array): array.nbytes for values in held for array in values.values()}
    return sum(arrays.values())


def measure(
    parts: Parts, pair: Pairing, cut: Cut, batches: Iterable[Feeds], padding: Padding, limit: int
) -> Measured:
    """Return the sums over all `batches`.

    Slices whose weights all fit into `limit` bytes stay open, and the batches are run one by one; else a
    slice is opened for as many batches as `limit` bytes of carried values allow.
    """
    names = [name for run in parts.names for name in run]
    outputs = [value.name or "" for value in pair.reference.graph.outputs]
    wanted = {name for name in parts.reference[-1].wanted if name in parts.actual[-1].wanted}
    found = Measured(
        {name: Sums() for name in names},
        {name: Sums() for name in names},
        {name: Sums() for name in outputs if name in wanted},
        slices=len(parts.names),
    )
    stays_open = weight_bytes(pair.reference) + 2 * weight_bytes(pair.actual) <= limit
    runs = _Runs(parts, pair, cut, padding, found, stays_open)
    stream, size = iter(batches), 1
    while group := list(islice(stream, size)):
        carried = runs.walk(group)
        found.batches += len(group)
        if not stays_open:
            size = max(1, limit * len(group) // max(carried, 1))
    return found
