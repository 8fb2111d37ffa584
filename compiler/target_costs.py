# SPDX-License-Identifier: Apache-2.0
"""Kernel costs of the machine at hand: measured, and what was measured before taken from a file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from splitfold.compiler.presets import exact
from splitfold.passes.base import Context
from splitfold.passes.kernel_cases import kernel_cases
from splitfold.runtime.costs.file import read_costs
from splitfold.runtime.costs.kernel import Case
from splitfold.runtime.costs.machine import Machine
from splitfold.runtime.costs.measure import Meter, measure_cases
from splitfold.runtime.costs.table import KernelCosts
from splitfold.runtime.feeds import Feeds
from splitfold.runtime.target import Target

__all__ = ["CostsMeasured", "known_costs", "measure_costs", "model_cases"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CostsMeasured:
    """What came of measuring.

    Attributes:
        costs: old and new samples.
        measured: how many cases were measured now.
        known: how many of those asked for were known.
        failed: by case, why it does not run here.
    """

    costs: KernelCosts
    measured: int
    known: int
    failed: Mapping[Case, str]


def model_cases(model: ir.Model, feeds: Feeds, target: Target) -> tuple[list[Case], list[str]]:
    """Return the kernels that `model` could run in at the shapes of `feeds`, and the names of layers whose
    shapes are not known; the model is not changed."""
    copy = model.clone()
    exact().run(copy, Context(target))
    return kernel_cases(copy, feeds)


def known_costs(path: Path, machine: Machine) -> KernelCosts:
    """Return what the file holds of `machine`; nothing where there is no file, or it is of another machine.

    Raises:
        ArtifactError: there is a file, and it holds no kernel costs.
    """
    if not path.exists():
        return KernelCosts(machine, {})
    found = read_costs(path)
    if differences := found.machine.differences(machine):
        logger.warning("%s was measured elsewhere (%s): all is measured again", path, "; ".join(differences))
        return KernelCosts(machine, {})
    return found


def measure_costs(
    known: KernelCosts,
    cases: Iterable[Case],
    meter: Meter,
    *,
    tell: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> CostsMeasured:
    """Measure those of `cases` that are not `known`.

    Args:
        known: what was measured before.
        cases: what is wanted.
        meter: what takes the times.
        tell: is called before each group of cases; see `measure_cases`.
    """
    wanted = list(dict.fromkeys(cases))
    missing = known.missing(wanted)
    found = measure_cases(missing, meter, tell=tell)
    costs = known.with_samples(found.samples)
    return CostsMeasured(costs, len(found.samples), len(wanted) - len(missing), found.failed)
