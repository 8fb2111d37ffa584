# SPDX-License-Identifier: Apache-2.0
"""Compilations that must fail, and the reproducers that they leave."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import pytest
from encoder import encoder, token_batches

from splitfold.compiler import Pipeline, compile
from splitfold.passes.base import Pass
from splitfold.passes.errors import FailureError

__all__ = ["LAYER", "count", "failed", "named_folder"]

LAYER = "encoder.layer.1.output.dense"
"""A layer of the small encoder."""


def failed(
    step: Pass | str, *, model: object = None, place: Path, **options: object
) -> tuple[FailureError, Path]:
    """Compile what must fail, and return the error and the folder that it names."""
    pipeline = step if isinstance(step, str) else Pipeline.of(step)
    options = {"example_inputs": token_batches()[0]} | options
    with pytest.raises(FailureError) as caught:
        compile(model or encoder(layers=2), pipeline=pipeline, reproducers=place, **options)
    return caught.value, named_folder(caught.value)


def named_folder(error: Exception) -> Path:
    found = re.search(r"Reproducer: (\S+) \((\d+) nodes?\): splitfold reproduce (\S+)", str(error))
    assert found is not None, str(error)
    assert found[1] == found[3]
    return Path(found[1])


def count(folder: Path) -> int:
    return len(onnx.load(folder / "model.onnx").graph.node)
