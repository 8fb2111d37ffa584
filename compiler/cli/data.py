# SPDX-License-Identifier: Apache-2.0
"""Feeds for commands that run models: the user's data, or synthetic ones."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from splitfold.compiler.locate import locate_data
from splitfold.compiler.source import runnable_feeds
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.feeds import model_inputs
from splitfold.runtime.target import Target

__all__ = ["open_data"]


def open_data(text: str | None, model: ir.Model, *, batch: int | None = None) -> tuple[Calibration, str]:
    """Return feeds for `model`, each checked against its inputs, and words that say what they are.

    Args:
        text: ``--data``; None makes one synthetic batch.
        model: what they are fed to.
        batch: samples a batch, where the source is one ``.npz`` and the model's batch axis is free.

    Raises:
        CalibrationError: the data does not fit.
        UnsupportedError: no synthetic feeds can be made that the model runs on.
    """
    if text is None:
        feeds = runnable_feeds(model, Target.cpu())
        return Calibration.of(feeds), "synthetic inputs (pass --data for real ones)"
    names = tuple(value.name or "" for value in model_inputs(model))
    data = Calibration.of(locate_data(text), inputs=names)
    resized = data.resized
    if batch is not None and resized is not None:
        data = dataclasses.replace(data, batches=lambda: resized(batch))
    return data.fitted(model).checked(model), text
