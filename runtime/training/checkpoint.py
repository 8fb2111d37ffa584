# SPDX-License-Identifier: Apache-2.0
"""A training run on disk: taken up again, it gives the same numbers as one that was never stopped."""

from __future__ import annotations

import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from splitfold.runtime.training.batches import Place
from splitfold.runtime.training.errors import TrainingError

__all__ = ["State", "read_checkpoint", "write_checkpoint"]


@dataclass(frozen=True)
class State:
    """What a run is after some steps.

    Attributes:
        key: digest of the model and the settings that it belongs to.
        step: steps done.
        place: the next batch.
        module: parameters and buffers by name.
        optimizer: the optimiser's own state.
        random: the state of torch's generator.
    """

    key: str
    step: int
    place: Place
    module: dict[str, Any]
    optimizer: dict[str, Any]
    random: torch.Tensor


def write_checkpoint(path: Path, state: State) -> None:
    """Write the state; a file that is there is replaced when the new one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        torch.save({**vars(state), "place": asdict(state.place)}, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_checkpoint(path: Path, key: str) -> State | None:
    """Return the state of the run of this key, or None where there is no file.

    Raises:
        TrainingError: the file is no checkpoint, or that of another model or of other settings.
    """
    if not path.exists():
        return None
    try:
        held = torch.load(path, weights_only=True)
        state = State(**{**held, "place": Place(**held["place"])})
    except (
        OSError,
        RuntimeError,
        TypeError,
        KeyError,
        ValueError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        raise TrainingError(f"'{path}' is no checkpoint of a training run: {error}") from error
    if state.key != key:
        raise TrainingError(
            f"'{path}' is the checkpoint of another model or of other settings. "
            "Remove it to start anew, or name another file."
        )
    return state
