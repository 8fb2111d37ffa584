# SPDX-License-Identifier: Apache-2.0
"""What a signal is: it says of each layer how much its error matters, or what each choice costs."""

from __future__ import annotations

import abc
import enum
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from splitfold.passes.precision import Precision
from splitfold.passes.signals.subject import Subject

__all__ = ["Basis", "Scores", "Signal", "measured"]

ByChoice = Mapping[str, Mapping[Precision, float]]
"""By layer name and precision."""


class Basis(enum.Enum):
    """What the numbers of a signal are."""

    LOSS = "loss"
    """Of each choice what it costs: `Scores.by_choice`; layers add up."""
    IMPORTANCE = "importance"
    """Of each layer what its relative output error, squared, is to be multiplied with."""
    ORDER = "order"
    """Of each layer a statistic of which only the order is used: a higher one wants more bits a weight."""


@dataclass(frozen=True)
class Scores:
    """What a signal found.

    Attributes:
        signal: its name.
        basis: what the numbers are.
        by_layer: a number for each layer, higher where bits matter more; not negative where it is an
            importance.
        by_choice: of a signal of losses, the loss of each choice of each layer.
        seconds: wall time that it took; not part of a plan.
    """

    signal: str
    basis: Basis
    by_layer: Mapping[str, float]
    by_choice: ByChoice = field(default_factory=dict)
    seconds: float = 0.0


class Signal(abc.ABC):
    """Something that tells layers apart by what low precision costs in them.

    A signal is a frozen dataclass over this class; its fields are its options. It gets a float model with the
    layers in question and calibration data, and returns scores for exactly these layers.
    """

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """For people: in plans and tables."""

    @abc.abstractmethod
    def scores(self, subject: Subject) -> Scores:
        """Return the scores of the layers of `subject`.

        Raises:
            CalibrationError: it needs calibration data that is missing or does not fit.
        """


def measured(signal: Signal, subject: Subject) -> Scores:
    """Return the scores of `signal` with the seconds that they took.

    Raises:
        ValueError: the signal left out a layer, or gave NaN.
    """
    start = time.perf_counter()
    found = signal.scores(subject)
    names = [layer.name for layer in subject.layers]
    if missing := [name for name in names if name not in found.by_layer]:
        raise ValueError(f"the signal {signal.name} gives no score for layer '{missing[0]}'.")
    losses = (found.by_choice[name][item] for name in found.by_choice for item in found.by_choice[name])
    if any(value != value for value in (*found.by_layer.values(), *losses)):
        raise ValueError(f"the signal {signal.name} gave NaN.")
    return replace(found, seconds=time.perf_counter() - start)
