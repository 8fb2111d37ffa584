# SPDX-License-Identifier: Apache-2.0
"""Batches of training data, epoch by epoch, in an order that a seed gives and that can be taken up again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from splitfold.runtime.feeds import check_feeds, model_inputs
from splitfold.runtime.lift.dtypes import array_tensor
from splitfold.runtime.training.errors import TrainingError

__all__ = ["Batch", "Data", "Place", "fitting", "walk"]

Batch: TypeAlias = Mapping[str, Any]
"""The model's inputs, and what else the loss needs, numpy arrays or tensors by name."""
Data: TypeAlias = Sequence[Batch] | Callable[[], Iterable[Batch]]
"""A list, shuffled anew in each epoch, or a function that returns the batches of one epoch in their order."""


@dataclass(frozen=True)
class Place:
    """Where a batch stands: its epoch, and its number in it, both from 0."""

    epoch: int = 0
    position: int = 0


def fitting(data: Data, model: ir.Model) -> Data:
    """Return the same data, each batch checked against the inputs of `model`: a list at once, what a function
    returns as it is read.

    Raises:
        TrainingError: an input has another rank, size or dtype than the model's, or holds NaN; the message
            says which batch.
    """
    if callable(data):
        return lambda: (_fit(batch, model, number) for number, batch in enumerate(data(), 1))
    if isinstance(data, Sequence):
        return [_fit(batch, model, number) for number, batch in enumerate(data, 1)]
    return data


def _fit(batch: Batch, model: ir.Model, number: int) -> Batch:
    inputs = [value.name or "" for value in model_inputs(model)]
    if isinstance(batch, Mapping) and all(name in batch for name in inputs):
        try:
            check_feeds(model, {name: np.asarray(batch[name]) for name in inputs}, where=f"batch {number}")
        except ValueError as error:
            raise TrainingError(str(error)) from error
    return batch


def walk(data: Data, seed: int, start: Place) -> Iterator[tuple[Place, dict[str, Tensor]]]:
    """Yield batches without end, from `start` on, each with the place of the next one.

    Raises:
        TrainingError: the data is empty, can be walked only once, or a batch is no mapping of arrays.
    """
    epoch, position = start.epoch, start.position
    while True:
        count = 0
        for batch in _epoch(data, seed, epoch):
            count += 1
            if count > position:
                yield Place(epoch, count), _tensors(batch, epoch, count)
        if not count:
            again = " a second time: give a function that returns a new iterator" if epoch else ""
            raise TrainingError(f"the training data gives no batch{again}.")
        epoch, position = epoch + 1, 0


def _epoch(data: Data, seed: int, epoch: int) -> Iterable[Batch]:
    if callable(data):
        return data()
    if not isinstance(data, Sequence):
        kind = type(data).__name__
        raise TrainingError(
            f"training data is a list of batches or a function that returns an iterator, not {kind}."
        )
    order = np.random.default_rng([seed, epoch]).permutation(len(data))
    return (data[index] for index in order)


def _tensors(batch: object, epoch: int, number: int) -> dict[str, Tensor]:
    if not isinstance(batch, Mapping):
        raise TrainingError(f"batch {number} of epoch {epoch} is {type(batch).__name__}, not arrays by name.")
    return {
        str(name): value if isinstance(value, torch.Tensor) else array_tensor(np.asarray(value))
        for name, value in batch.items()
    }
