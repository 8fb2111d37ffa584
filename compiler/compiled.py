# SPDX-License-Identifier: Apache-2.0
"""What `compile` returns: an artifact that still knows what it was made from."""

from __future__ import annotations

from dataclasses import dataclass

from splitfold.compiler.source import Source
from splitfold.passes.pipeline import PassRecord
from splitfold.runtime.artifact import Artifact

__all__ = ["Compiled"]


@dataclass(frozen=True, kw_only=True)
class Compiled(Artifact):
    """An artifact, fresh from `compile`.

    Attributes:
        records: the pass records, with times.
        source: the model before any pass, the feeds that the outputs were compared on, and the calibration
            data.
    """

    records: tuple[PassRecord, ...]
    source: Source
