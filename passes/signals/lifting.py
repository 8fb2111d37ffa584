# SPDX-License-Identifier: Apache-2.0
"""The float model as a torch module, for signals that need relevance or gradients; torch is an extra."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from splitfold.passes.layers import Layer
from splitfold.passes.precision import Precision
from splitfold.passes.signals.deviations import measured_batches, walked
from splitfold.passes.signals.subject import Subject
from splitfold.runtime.errors import UnsupportedError
from splitfold.runtime.feeds import Array, Feeds

if TYPE_CHECKING:
    from splitfold.runtime.lift import Lifted

__all__ = ["Moved", "lifted_model", "moved", "no_path", "samples_of"]

_HELD = 2**28
"""Bytes of factors, one an element of each layer's output, that are held at once."""


def lifted_model(subject: Subject, who: str) -> Lifted:
    """Return the float model of `subject`, lifted.

    Raises:
        UnsupportedError: torch is not installed; or an operator cannot be lifted, which the message names.
    """
    try:
        from splitfold.runtime.lift import lift
    except ImportError as error:
        raise UnsupportedError(f"{who} needs torch: pip install 'splitfold[torch]'.") from error
    try:
        return lift(subject.model)
    except UnsupportedError as error:
        raise UnsupportedError(f"{who} needs the model as a torch module: {error}") from error


def no_path(layer: Layer, who: str) -> UnsupportedError:
    """Return the error for a layer from which float operators lead to no output."""
    return UnsupportedError(
        f"{who} finds no float operators that lead from layer '{layer.name}' to an output: exclude "
        "the layer, or take a signal that measures, such as sensitivity."
    )


def samples_of(feeds: Feeds) -> int:
    """Return the samples of a batch: the first axis of its inputs, or 1 where they differ in it."""
    sizes = {np.shape(array)[0] for array in feeds.values() if np.ndim(array)}
    return sizes.pop() if len(sizes) == 1 else 1


@dataclass(frozen=True, eq=False)
class Moved:
    """What a layer's choices do to its output in one batch.

    Attributes:
        layer: of the float model.
        feeds: the batch.
        expected: what comes out in float (after the layer's bias, where its low-bit forms hold that too).
        errors: by precision, what comes out less `expected`.
        factor: what was asked for, an array in the shape of `expected`.
    """

    layer: Layer
    feeds: Feeds
    expected: Array
    errors: Mapping[Precision, Array]
    factor: Array


def moved(
    subject: Subject, who: str, factors: Callable[[Feeds, int, Sequence[str]], Mapping[str, Array]]
) -> Iterator[Moved]:
    """Yield what each choice really does to each layer's output, with a factor for each element of it.

    All factors of a batch come at once; batches are taken together as long as they fit into memory, so that
    each layer's forms are opened once for many of them.

    Args:
        subject: with calibration data, of which the first batches are used.
        who: what asks for it, for errors.
        factors: returns the factors by value name, from a batch, its number, and the names.

    Raises:
        CalibrationError: there is no calibration data, or it does not fit.
        UnsupportedError: a factor is missing: no path leads from the layer to an output.
    """
    names = [piece.end.name or "" for piece in subject.pieces]
    batches, held, size = [], [], 0
    data = measured_batches(subject, who)
    for turn, feeds in enumerate(data):
        found = factors(feeds, turn, names)
        batches.append(feeds)
        held.append(found)
        size += sum(array.nbytes for array in found.values())
        if size >= _HELD or turn == len(data) - 1:
            yield from _moved_together(subject, who, batches, held)
            batches, held, size = [], [], 0


def _moved_together(
    subject: Subject, who: str, batches: Sequence[Feeds], held: Sequence[Mapping[str, Array]]
) -> Iterator[Moved]:
    for piece in subject.pieces:
        if any(piece.end.name not in found for found in held):
            raise no_path(piece.layer, who)
    for step in walked(subject, batches):
        for at, feeds in enumerate(batches):
            expected = step.expected[at]
            errors = {item: made[at] - expected for item, made in step.made.items()}
            yield Moved(step.piece.layer, feeds, expected, errors, held[at][step.piece.end.name or ""])
