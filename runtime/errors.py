# SPDX-License-Identifier: Apache-2.0
"""The root of all errors of splitfold, and those that running a model can raise."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArtifactError",
    "CalibrationError",
    "GenerationError",
    "ProviderError",
    "SessionError",
    "SplitfoldError",
    "UnsupportedError",
    "did_you_mean",
]


class SplitfoldError(Exception):
    """Root of every error that splitfold raises on purpose; catch it to catch them all."""


class SessionError(SplitfoldError):
    """ONNX Runtime refused or failed to run a model.

    Common causes: feeds of another name, shape or dtype than the model's inputs; a custom operator whose
        library is
    not registered; a shape that the model computes and that does not fit. The message quotes the runtime.
    """


class CalibrationError(SplitfoldError):
    """Calibration data is missing, empty, or does not fit the model's inputs.

    Common causes: a generator that is already used up (pass the generator *function*), an ``.npz`` whose
        keys are not the
    input names, NaN in the data. The message names the input and the batch.
    """


class GenerationError(SplitfoldError):
    """Text cannot be generated with a model.

    Common causes: a model without a cache of keys and values, an empty prompt, more positions than the model
    knows. The message says what to do.
    """


class ProviderError(SplitfoldError):
    """The execution provider of a target cannot be used here.

    Common causes: its package is not installed, it knows no device of this machine, or it was built for
        another ONNX Runtime. The message names the cure.
    """


class UnsupportedError(SplitfoldError):
    """The model or the target holds something that splitfold does not handle; the message names the node and
    why."""


class ArtifactError(SplitfoldError):
    """A model file or artifact folder cannot be read or written.

    Common causes: a path that does not exist, a truncated file, missing external data next to the
        ``.onnx``, a folder that is
    not empty (pass ``overwrite=True``), a full disk. Nothing half-written remains.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest known word, or an empty text."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
