# SPDX-License-Identifier: Apache-2.0
"""Training of lifted models: the loop, its checkpoints, and quantization in the loop. Needs torch."""

from __future__ import annotations

from splitfold.runtime.lift import Lifted as _Lifted  # says that torch is missing, where it is
from splitfold.runtime.training.batches import Batch, Data
from splitfold.runtime.training.errors import TrainingError
from splitfold.runtime.training.fake_weights import WeightScale
from splitfold.runtime.training.in_loop import Annealing, InLoop
from splitfold.runtime.training.loop import Loss, Optimizer, Schedule, Step

__all__ = [
    "Annealing",
    "Batch",
    "Data",
    "InLoop",
    "Loss",
    "Optimizer",
    "Schedule",
    "Step",
    "TrainingError",
    "WeightScale",
]

del _Lifted
