# SPDX-License-Identifier: Apache-2.0
"""Seeded random numbers in place of a model's weights and inputs: a failure is then shown without them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from zlib import crc32

import numpy as np
import onnx_ir as ir

from splitfold.compiler.debug.reproduce.case import Case
from splitfold.runtime.feeds import Array, Feeds

__all__ = ["SEED", "random_inputs", "random_weights", "weight_names"]

SEED = 0
"""The generator of an array is seeded with this and with the array's name."""
_LEAST_ELEMENTS = 2


def weight_names(model: ir.Model) -> list[str]:
    """Return the names of the initializers that hold weights: floats and 8-bit codes, not shapes."""
    return [
        name
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
        and value.const_value.size >= _LEAST_ELEMENTS
        and _is_weight(value.const_value)
    ]


def _is_weight(tensor: ir.TensorProtocol) -> bool:
    if tensor.dtype.is_floating_point():
        return tensor.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
    return tensor.dtype in (ir.DataType.INT8, ir.DataType.UINT8) and len(tensor.shape) > 1


def random_weights(model: ir.Model, names: Collection[str]) -> ir.Model:
    """Return a copy of `model` whose initializers `names` are random, of the same shape, type and spread."""
    made = model.clone()
    for name in names:
        value = made.graph.initializers[name]
        if value.const_value is not None:
            value.const_value = ir.tensor(_random(name, value.const_value.numpy()), name=name)
    return made


def random_inputs(case: Case, names: Collection[str]) -> Case:
    """Return `case` with the inputs `names` random in all feeds, of the same shapes, types and spread."""

    def replaced(feeds: Feeds, run: int) -> Feeds:
        return {
            name: _random(f"{name}:{run}", array) if name in names else array for name, array in feeds.items()
        }

    batches = tuple(replaced(feeds, run + 1) for run, feeds in enumerate(case.batches))
    return dataclasses.replace(case, feeds=replaced(case.feeds or {}, 0), batches=batches)


def _random(name: str, array: Array) -> Array:
    rng = np.random.default_rng([SEED, crc32(name.encode())])
    if not array.size or array.dtype.kind not in "fiub":
        return array
    if array.dtype.kind == "b":
        return rng.integers(0, 2, array.shape).astype(bool)
    if array.dtype.kind in "iu":
        low, high = int(array.min()), int(array.max())
        return rng.integers(low, high, array.shape, endpoint=True).astype(array.dtype)
    return _random_floats(rng, array).astype(array.dtype)


def _random_floats(rng: np.random.Generator, array: Array) -> Array:
    """Normal numbers of the same mean and deviation; uniform ones where all are positive, as scales are."""
    numbers = array.astype(np.float64)
    finite = numbers[np.isfinite(numbers)]
    if not finite.size:
        return numbers
    if finite.min() > 0:
        return rng.uniform(finite.min(), finite.max(), array.shape)
    return rng.normal(finite.mean(), finite.std(), array.shape)
