# SPDX-License-Identifier: Apache-2.0
"""Which layers a pass is likely to have harmed: a hint from the error that each adds, never a proof."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence

import onnx_ir as ir

from splitfold.compiler.debug.drift.measurement import drift
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.errors import SplitfoldError
from splitfold.runtime.target import Target

__all__ = ["by_suspicion", "suspects"]

logger = logging.getLogger(__name__)

_BATCHES = 2
"""Batches that suspicion is measured on."""


def suspects(before: ir.Model, after: ir.Model, data: Calibration, target: Target) -> tuple[str, ...]:
    """Return the layers in which an error arises between two models, the worst first.

    Args:
        before, after: what the target opens. Where one of them does not run, the result is empty.
        data: inputs; the first batches are used.
    """
    few = Calibration(lambda: itertools.islice(iter(data), _BATCHES))
    try:
        found = drift(before, after, few, target=target)
    except SplitfoldError as error:
        logger.info("suspicion could not be measured: %s", error)
        return ()
    except Exception as error:  # a hint must not end the search
        logger.warning("suspicion could not be measured: %s: %s", type(error).__name__, error)
        return ()
    return tuple(dict.fromkeys(point.layer for point in found.sources()))


def by_suspicion(layers: Sequence[str], ranking: Sequence[str]) -> list[str]:
    """Return `layers` in the order of `ranking`, those that it does not name last; a group recorded under
    several names (``a+b``) counts as the worst of them."""
    place = {name: position for position, name in enumerate(ranking)}

    def key(layer: str) -> int:
        return min(place.get(name, len(place)) for name in (layer, *layer.split("+")))

    return sorted(layers, key=key)
