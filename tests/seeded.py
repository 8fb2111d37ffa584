# SPDX-License-Identifier: Apache-2.0
"""ONNX text with seeded weights, and seeded feeds.

An initializer declared as ``float[4,3] W = seeded`` is filled with standard normal numbers,
``seeded(0, 1)`` with uniform ones (integers below the second). The generator is seeded with the name, so a
weight does not depend on what stands around it. Feeds are directed in the same way: ``x = seeded(-1, 1)``,
or by value: ``mask = [1, 1, 0]``.
"""

from __future__ import annotations

import re
from zlib import crc32

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir

from splitfold.runtime.feeds import Array, synthetic_feeds

__all__ = ["feeds_for", "parse_graph"]

_NUMBER = r"[-+0-9.eE]+"
_RANGE = rf"seeded(?:\(\s*(?P<low>{_NUMBER})\s*,\s*(?P<high>{_NUMBER})\s*\))?"
_WEIGHT = re.compile(rf"(?P<kind>\w+)\s*\[(?P<dims>[\d,\s]*)\]\s+(?P<name>\w+)\s*=\s*{_RANGE}")
_FEED = re.compile(rf"(?P<name>\w+)\s*=\s*(?:{_RANGE}|\[(?P<values>[^\]]*)\])")


def parse_graph(text: str) -> onnx.ModelProto:
    """Return the model of an ONNX text, seeded initializers filled."""
    weights = [_weight(match) for match in _WEIGHT.finditer(text)]
    model = onnx.parser.parse_model(_WEIGHT.sub(r"\g<kind>[\g<dims>] \g<name>", text))
    names = {weight.name for weight in weights}
    kept = [info for info in model.graph.value_info if info.name not in names]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    model.graph.initializer.extend(weights)
    return model


def _weight(match: re.Match[str]) -> onnx.TensorProto:
    shape = [int(dim) for dim in match["dims"].split(",") if dim.strip()]
    kind = onnx.TensorProto.DataType.Value(match["kind"].upper())
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
    array = _fill(match, np.random.default_rng(crc32(match["name"].encode())), shape, dtype)
    return onnx.numpy_helper.from_array(array, match["name"])


def _fill(
    match: re.Match[str], rng: np.random.Generator, shape: list[int], dtype: np.dtype[np.generic]
) -> Array:
    if dtype.kind in "iu":
        return rng.integers(int(match["low"] or 0), int(match["high"] or 2), shape).astype(dtype)
    if match["low"] is None:
        return rng.standard_normal(shape).astype(dtype)
    return rng.uniform(float(match["low"]), float(match["high"]), shape).astype(dtype)


def feeds_for(model: ir.Model, directives: str = "", *, seed: int = 0) -> dict[str, Array]:
    """Return synthetic feeds of a model, those named in `directives` as directed.

    A list of values fills its input row by row.
    """
    feeds = synthetic_feeds(model, seed=seed)
    for match in _FEED.finditer(directives):
        name, old = match["name"], feeds[match["name"]]
        if match["values"] is not None:
            feeds[name] = np.resize(
                np.array([float(value) for value in match["values"].split(",")]), old.shape
            ).astype(old.dtype)
        else:
            feeds[name] = _fill(
                match, np.random.default_rng([seed, crc32(name.encode())]), list(old.shape), old.dtype
            )
    return feeds
