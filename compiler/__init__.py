# SPDX-License-Identifier: Apache-2.0
"""The compiler: `compile` a model into a verified artifact."""

from __future__ import annotations

from splitfold.compiler import presets
from splitfold.compiler.debug.snapshots import Snapshots
from splitfold.compiler.decoder import Logits, capture_decoder
from splitfold.compiler.driver import compile
from splitfold.compiler.finetuning import Trained, finetune
from splitfold.compiler.realisation import Unrealised
from splitfold.compiler.search.options import Goal, Search, Unmet
from splitfold.compiler.speed import IfSlower, Speed, SpeedCheck
from splitfold.compiler.substitution import substitute
from splitfold.compiler.tolerance import Budget, Tolerance
from splitfold.passes.pipeline import Pipeline
from splitfold.runtime.artifact import Artifact
from splitfold.runtime.generation import Generation, Generator
from splitfold.runtime.sampling import Sampling
from splitfold.runtime.session import Session
from splitfold.runtime.target import Target

__all__ = [
    "Artifact",
    "Budget",
    "Generation",
    "Generator",
    "Goal",
    "IfSlower",
    "Logits",
    "Pipeline",
    "Sampling",
    "Search",
    "Session",
    "Snapshots",
    "Speed",
    "SpeedCheck",
    "Target",
    "Tolerance",
    "Trained",
    "Unmet",
    "Unrealised",
    "capture_decoder",
    "compile",
    "finetune",
    "presets",
    "substitute",
]
