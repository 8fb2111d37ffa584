# SPDX-License-Identifier: Apache-2.0
"""Evaluations by the digest of what was evaluated: in memory, and in a folder where one is given."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from splitfold.compiler.search.scores import Scores
from splitfold.runtime.errors import ArtifactError
from splitfold.runtime.session import runtime_version
from splitfold.runtime.target import Target

__all__ = ["EvaluationCache"]

logger = logging.getLogger(__name__)


@dataclass
class EvaluationCache:
    """Scores by model digest.

    What a metric computes cannot be seen from outside: its name goes into the key, and a search asks
    `agrees` with the scores of the original, measured anew. A folder that does not agree is written over.

    Args:
        metric: name of the metric.
        target: where models run.
        folder: where evaluations are kept, one JSON file each; None is in memory only.
    """

    metric: str
    target: Target
    folder: Path | None = None
    _known: dict[str, Scores] = field(default_factory=dict)
    _trusted: bool = True

    def __post_init__(self) -> None:
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"cannot keep evaluations in {self.folder}: {error.strerror}.") from error

    def agrees(self, digest: str, scores: Scores) -> bool:
        """Whether the folder holds these scores of the original, or none; if it holds others, all that is in
        it is of another metric or other data, and is no longer read."""
        before = self._read(digest)
        if before is not None and not before.same_as(scores):
            logger.warning(
                "the evaluations in %s are not used: evaluate gave the original model %.6g when they were "
                "made, and gives it %.6g now",
                self.folder,
                before.metric,
                scores.metric,
            )
            self._trusted = False
        return self._trusted

    def get(self, digest: str) -> Scores | None:
        """Return the scores of a model, or None."""
        if digest not in self._known and self._trusted and (found := self._read(digest)) is not None:
            self._known[digest] = found
        return self._known.get(digest)

    def put(self, digest: str, scores: Scores) -> None:
        """Keep the scores of a model.

        Raises:
            ArtifactError: the folder cannot be written.
        """
        self._known[digest] = scores
        file = self._file(digest)
        if file is None:
            return
        held = {
            "metric": self.metric,
            "model": digest,
            "per-sample": scores.per_sample,
            "scores": scores.values.tolist(),
        }
        scratch = file.with_suffix(f".{os.getpid()}.tmp")
        try:
            scratch.write_text(json.dumps(held, sort_keys=True), encoding="utf-8")
            scratch.replace(file)
        except OSError as error:
            raise ArtifactError(f"cannot keep an evaluation in {self.folder}: {error.strerror}.") from error

    def _file(self, digest: str) -> Path | None:
        if self.folder is None:
            return None
        key = "\0".join((digest, self.metric, self.target.name, runtime_version()))
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    def _read(self, digest: str) -> Scores | None:
        file = self._file(digest)
        if file is None or not file.is_file():
            return None
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
            return Scores(np.array(held["scores"], np.float64).reshape(-1), bool(held["per-sample"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is no evaluation and is made anew: %s", file, error)
            return None
