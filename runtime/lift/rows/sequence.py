# SPDX-License-Identifier: Apache-2.0
"""Sequences (lists of tensors) and optional values (None where there is none)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from splitfold.runtime.lift.carried import integers
from splitfold.runtime.lift.row import Extra, Row, Rows

__all__ = ["ROWS"]


def construct(*tensors: Tensor) -> list[Tensor]:
    """SequenceConstruct."""
    return list(tensors)


def empty(*, dtype: int = 1) -> list[Tensor]:
    """SequenceEmpty."""
    return []


def at(sequence: list[Tensor], position: Any) -> Tensor:
    """SequenceAt."""
    return sequence[integers(position)[0]]


def insert(sequence: list[Tensor], tensor: Tensor, position: Any = None) -> list[Tensor]:
    """SequenceInsert: before a position, or at the end."""
    place = len(sequence) if position is None else integers(position)[0]
    return [*sequence[:place], tensor, *sequence[place:]]


def erase(sequence: list[Tensor], position: Any = None) -> list[Tensor]:
    """SequenceErase: at a position, or the last."""
    place = (-1 if position is None else integers(position)[0]) % len(sequence)
    return [*sequence[:place], *sequence[place + 1 :]]


def length(sequence: list[Tensor], *, anchor: Tensor) -> Tensor:
    """SequenceLength."""
    return torch.tensor(len(sequence), device=anchor.device)


def split_to_sequence(x: Tensor, split: Any = None, *, axis: int = 0, keepdims: int = 1) -> list[Tensor]:
    """SplitToSequence: by sizes, by one size, or one by one."""
    if split is None:
        parts = torch.split(x, 1, axis)
        return list(parts) if keepdims else [part.squeeze(axis) for part in parts]
    sizes = integers(split)
    one = not hasattr(split, "__len__") or getattr(split, "ndim", 1) == 0
    return list(torch.split(x, sizes[0] if one else sizes, axis))


def concat_from_sequence(sequence: list[Tensor], *, axis: int, new_axis: int = 0) -> Tensor:
    """ConcatFromSequence."""
    return torch.stack(sequence, axis) if new_axis else torch.cat(sequence, axis)


def optional_has_element(value: Any = None, *, anchor: Tensor) -> Tensor:
    """OptionalHasElement."""
    return torch.tensor(value is not None, device=anchor.device)


def optional_get_element(value: Any) -> Any:
    """OptionalGetElement."""
    return value


_MADE = (Extra.ANCHOR,)

ROWS: Rows = {
    "ConcatFromSequence": Row(concat_from_sequence),
    "OptionalGetElement": Row(optional_get_element),
    "OptionalHasElement": Row(optional_has_element, extras=_MADE),
    "SequenceAt": Row(at, host=(1,)),
    "SequenceConstruct": Row(construct),
    "SequenceEmpty": Row(empty),
    "SequenceErase": Row(erase, host=(1,)),
    "SequenceInsert": Row(insert, host=(2,)),
    "SequenceLength": Row(length, extras=_MADE),
    "SplitToSequence": Row(split_to_sequence, host=(1,)),
}
