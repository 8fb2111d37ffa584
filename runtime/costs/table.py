# SPDX-License-Identifier: Apache-2.0
"""Measured times of kernels, and what follows from them for other shapes."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from splitfold.runtime.costs.interpolation import interpolated
from splitfold.runtime.costs.kernel import Case, Kernel, Shape
from splitfold.runtime.costs.machine import Machine

__all__ = ["Estimate", "KernelCosts", "Sample"]


@dataclass(frozen=True)
class Sample:
    """What a kernel took at a shape.

    Attributes:
        milliseconds: median over the runs, less what an empty model takes.
        low, high: first and last quartile.
        runs: how many.
    """

    milliseconds: float
    low: float
    high: float
    runs: int


@dataclass(frozen=True)
class Estimate:
    """What a kernel is expected to take.

    Attributes:
        milliseconds: of one call.
        factor: how far the nearest measured shape is: the largest ratio between two sizes; 1 is measured.
    """

    milliseconds: float
    factor: float

    @property
    def measured(self) -> bool:
        """Whether this very shape was measured."""
        return self.factor == 1


@dataclass(frozen=True, eq=False)
class KernelCosts:
    """Times of kernels on one machine.

    Attributes:
        machine: where they were taken.
        samples: by case.
    """

    machine: Machine
    samples: Mapping[Case, Sample]

    @functools.cached_property
    def _times(self) -> dict[Kernel, dict[Shape, float]]:
        found: dict[Kernel, dict[Shape, float]] = {}
        for case, sample in self.samples.items():
            found.setdefault(case.kernel, {})[case.shape] = sample.milliseconds
        return found

    def kernels(self) -> tuple[Kernel, ...]:
        """Return the kernels that were measured at some shape."""
        return tuple(self._times)

    def estimate(self, kernel: Kernel, shape: Shape) -> Estimate | None:
        """Return what `kernel` takes at `shape`; None where it was never measured.

        Raises:
            ValueError: the shape is none of its operation.
        """
        Case(kernel, shape)
        times = self._times.get(kernel)
        if not times:
            return None
        milliseconds = interpolated(kernel.operation, shape, times)
        return Estimate(milliseconds, min(_factor(shape, other) for other in times))

    def missing(self, cases: Iterable[Case]) -> list[Case]:
        """Return those of `cases` that were not measured, each once, in order."""
        return [case for case in dict.fromkeys(cases) if case not in self.samples]

    def with_samples(self, samples: Mapping[Case, Sample]) -> KernelCosts:
        """Return these costs with `samples` added, or in the place of older ones."""
        return replace(self, samples={**self.samples, **samples})


def _factor(one: Shape, other: Shape) -> float:
    return math.exp(max(abs(math.log(a / b)) for a, b in zip(one, other, strict=True)))
