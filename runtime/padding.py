# SPDX-License-Identifier: Apache-2.0
"""Positions of a batch that only fill it up: what a model computes there is read by nobody.

Their values are often unstable, such as those of padding tokens that switch between two states, and would
hide the error of the positions that count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitfold.runtime.feeds import Array, Feeds, model_inputs

__all__ = ["PADDING", "Padding", "marks_padding", "usual_padding"]

PADDING = "attention_mask"
"""Input that marks padding by 0, where a model has it."""


@dataclass(frozen=True)
class Padding:
    """Where padding is marked: by 0 in an input of shape [batch, positions], or nowhere (None)."""

    input: str | None = None

    def without(self, feeds: Feeds, array: Array) -> Array:
        """Return the elements of `array` at positions that count.

        The positions lie along the first two axes, or along the first and third of four (attention heads), or
        along the first one, flattened; an array without such axes is returned whole.
        """
        mask = feeds[self.input] if self.input is not None else None
        if mask is None or mask.ndim != 2 or mask.all():
            return array
        count = mask != 0
        if array.shape[:2] == mask.shape:
            return np.asarray(array[count])
        if array.ndim == 4 and (array.shape[0], array.shape[2]) == mask.shape:
            return np.asarray(np.moveaxis(array, 2, 1)[count])
        if array.ndim > 1 and array.shape[0] == mask.size:
            return np.asarray(array[count.ravel()])
        return array


def usual_padding(model: ir.Model) -> Padding:
    """Return the padding that the input of the usual name marks, or none."""
    named = (value for value in model_inputs(model) if value.name == PADDING)
    return Padding(PADDING if any(map(marks_padding, named)) else None)


def marks_padding(value: ir.Value | None) -> bool:
    """Return whether an input can mark padding: whole numbers of shape [batch, positions]."""
    if value is None or value.shape is None or value.dtype is None:
        return False
    return len(value.shape) == 2 and not value.dtype.is_floating_point()
