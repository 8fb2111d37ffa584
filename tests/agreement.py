# SPDX-License-Identifier: Apache-2.0
"""A metric that other processes can be sent: how near a model's outputs are to those of another one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.session import Session

__all__ = ["Agreement"]


@dataclass(frozen=True, eq=False)
class Agreement:
    """Less the squared distance of a row's outputs from the reference, one score a row or their mean."""

    feeds: Feeds
    reference: Array
    per_sample: bool = True

    @staticmethod
    def with_model(model: ir.Model, feeds: Feeds, *, per_sample: bool = True) -> Agreement:
        return Agreement(feeds, Session(model).run(feeds)["y"], per_sample)

    def __call__(self, session: Session) -> float | Array:
        lost = np.square(session.run(self.feeds)["y"] - self.reference)
        scores = -lost.reshape(len(lost), -1).mean(1, dtype=np.float64)
        return scores if self.per_sample else float(scores.mean())
