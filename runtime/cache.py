# SPDX-License-Identifier: Apache-2.0
"""The key and value cache of a causal language model: which inputs and outputs it is, and of what shape."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from splitfold.runtime.errors import GenerationError
from splitfold.runtime.feeds import Array

__all__ = ["POSITIONS_KEY", "CacheLayout", "CacheShape"]

POSITIONS_KEY = "splitfold.positions"
"""Key of the model's metadata that says how many positions it knows, past included."""
_PAST = re.compile(r"^past(?:_key_values)?\.(\d+)\.(?:.*\.)?(key|value)s?$")
_PRESENT = re.compile(r"^present(?:_key_values)?\.(\d+)\.(?:.*\.)?(key|value)s?$")
_ROLES = ("key", "value")


@dataclass(frozen=True)
class CacheLayout:
    """Names of the cache's inputs and outputs, keys and values in turn, one pair a layer.

    Each holds [batch, heads of keys, positions, size]; an input those of the past, which may be none, an
    output those of the past and of this call.

    Attributes:
        past: inputs.
        present: outputs, in the same order.
    """

    past: tuple[str, ...]
    present: tuple[str, ...]

    @staticmethod
    def standard(layers: int) -> CacheLayout:
        """Return ``past.N.key``, ``past.N.value`` and ``present.N.key``, ``present.N.value``."""
        pairs = [(layer, role) for layer in range(layers) for role in _ROLES]
        return CacheLayout(
            tuple(f"past.{layer}.{role}" for layer, role in pairs),
            tuple(f"present.{layer}.{role}" for layer, role in pairs),
        )

    @staticmethod
    def find(model: ir.Model) -> CacheLayout:
        """Return the cache of a model by the names of its inputs and outputs: ours, or
        ``past_key_values.N.key`` and ``present.N.key`` as other exporters write them.

        Raises:
            GenerationError: it has none, or an input of it has no output.
        """
        inputs = dict(_numbered(model.graph.inputs, _PAST))
        outputs = dict(_numbered(model.graph.outputs, _PRESENT))
        if not inputs:
            names = ", ".join(value.name or "" for value in model.graph.inputs)
            raise GenerationError(
                f"the model has no cache: none of its inputs ({names}) is called past.0.key. Export it with "
                "capture_decoder."
            )
        order = sorted(inputs, key=lambda key: (key[0], _ROLES.index(key[1])))
        for key in order:
            if key not in outputs:
                raise GenerationError(
                    f"input '{inputs[key]}' has no output beside it: 'present.{key[0]}.{key[1]}' is missing."
                )
        return CacheLayout(tuple(inputs[key] for key in order), tuple(outputs[key] for key in order))


def _numbered(values: Sequence[ir.Value], form: re.Pattern[str]) -> Iterator[tuple[tuple[int, str], str]]:
    for value in values:
        match = form.match(value.name or "")
        if match is not None:
            yield (int(match[1]), match[2]), value.name or ""


@dataclass(frozen=True)
class CacheShape:
    """What an empty cache is made of: heads, size and dtype of each input of the layout."""

    layout: CacheLayout
    sizes: tuple[tuple[int, int], ...]
    dtypes: tuple[np.dtype[Any], ...]

    @staticmethod
    def of(model: ir.Model) -> CacheShape:
        """Read it from the model's inputs.

        Raises:
            GenerationError: the model has no cache, or its heads or their size are not fixed.
        """
        layout = CacheLayout.find(model)
        by_name = {value.name: value for value in model.graph.inputs}
        sizes, dtypes = [], []
        for name in layout.past:
            value = by_name[name]
            shape = list(value.shape) if value.shape is not None else []
            if len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
                raise GenerationError(
                    f"input '{name}' has the shape {value.shape}: a cache is [batch, heads, positions, size] "
                    "with heads and size fixed."
                )
            sizes.append((shape[1], shape[3]))
            dtypes.append(value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32))
        return CacheShape(layout, tuple(sizes), tuple(dtypes))

    def empty(self, batch: int = 1) -> dict[str, Array]:
        """Return a past of no position."""
        parts = zip(self.layout.past, self.sizes, self.dtypes, strict=True)
        return {name: np.zeros((batch, heads, 0, size), dtype) for name, (heads, size), dtype in parts}
