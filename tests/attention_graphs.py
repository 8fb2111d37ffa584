# SPDX-License-Identifier: Apache-2.0
"""A masked multi-head attention with its projections, made with onnx helpers, and the same in numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from seeded import parse_graph

from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.session import Optimization, Session

__all__ = ["HEADS", "KEYS", "SIZE", "Block", "attention_graph", "numpy_softmax", "outputs", "seeded_feeds"]

HEADS, SIZE, KEYS = 3, 8, 6
_WIDTH = HEADS * SIZE
_TEXT = """<ir_version: 10, opset_import: ["" : 20]>
net (float[batch,{time},{width}] x, bool[batch,1,{time},{time}] keep) => (float[batch,{time},{width}] y)
<float[{width},{width}] A = seeded, float[{width},{width}] B = seeded, float[{width},{width}] C = seeded,
 float[{width},{width}] D = seeded, int64[4] apart = {{0, 0, {heads}, {size}}},
 int64[3] joined = {{0, 0, {width}}}, float scale = {{0.35355338}}, float low = {{{low}}}, float no = {{0.0}}>
{{
  [query] q0 = MatMul(x, A)
  [key] k0 = MatMul(x, B)
  [value] v0 = MatMul(x, C)
  [query] q1 = Reshape(q0, apart)
  [key] k1 = Reshape(k0, apart)
  [value] v1 = Reshape(v0, apart)
  [query] q = Transpose<perm = [0, 2, 1, 3]>(q1)
  [key] kt = Transpose<perm = [0, 2, 3, 1]>(k1)
  [value] v = Transpose<perm = [0, 2, 1, 3]>(v1)
  [scores] s = MatMul(q, kt)
  [scaled] l = Mul(s, scale)
  [mask] m = Where(keep, no, low)
  [masked] a = Add(l, m)
  [attention] p = Softmax<axis = -1>(a)
  {guard}
  [context] c = MatMul(g, v)
  [merge] ct = Transpose<perm = [0, 2, 1, 3]>(c)
  [merge] cj = Reshape(ct, joined)
  [out] y = MatMul(cj, D)
}}
"""
_GUARD = "[guard] n = IsNaN(p)\n  [guard] g = Where(n, no, p)"


@dataclass(frozen=True)
class Block:
    """What a graph of `attention_graph` computes, in numpy float64."""

    weights: dict[str, Array]
    scale: float
    low: float

    def __call__(
        self, feeds: Feeds, function: Callable[[Array], Array], gate: Array | float = 1.0
    ) -> tuple[Array, Array]:
        """Return the output and the probabilities, where `function` gives those of masked logits and `gate`
        [batch, heads, time, 1] multiplies the context."""
        x = feeds["x"].astype(np.float64)
        q, k, v = (self._heads(x @ self.weights[name]) for name in "ABC")
        masked = self.scale * (q @ k.swapaxes(-1, -2)) + np.where(feeds["keep"], 0.0, self.low)
        probabilities = function(masked)
        context = (probabilities @ v) * gate
        return context.swapaxes(1, 2).reshape(x.shape) @ self.weights["D"], probabilities

    def logits(self, feeds: Feeds) -> Array:
        """Return scaled products of queries and keys without the mask."""
        x = feeds["x"].astype(np.float64)
        q, k = (self._heads(x @ self.weights[name]) for name in "AB")
        return np.asarray(self.scale * (q @ k.swapaxes(-1, -2)))

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], HEADS, SIZE).swapaxes(1, 2)


def attention_graph(
    *, low: float = -3.4e38, guard: bool = False, keys: str | int = KEYS
) -> tuple[ir.Model, Block]:
    """Return a canonical attention layer, from float x [batch, keys, 24] and bool keep [batch, 1, keys, keys]
    to y as x, and the same in numpy."""
    text = _TEXT.format(
        time=keys, width=_WIDTH, heads=HEADS, size=SIZE, low=low, guard=_GUARD if guard else _COPY
    )
    model = ir.from_proto(parse_graph(text))
    for name in "ABCD":
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() / np.float32(np.sqrt(_WIDTH)), name=name)
    CanonicalizePass()(model)
    weights = {
        name: model.graph.initializers[name].const_value.numpy().astype(np.float64)  # type: ignore[union-attr]
        for name in "ABCD"
    }
    return model, Block(weights, float(np.float32(0.35355338)), low)


_COPY = "[copy] g = Identity(p)"


def seeded_feeds(seed: int = 0, *, batch: int = 2, keys: int = KEYS, empty_rows: bool = False) -> Feeds:
    """Return seeded inputs with a mask of padding, some of whose rows keep no key where `empty_rows`."""
    rng = np.random.default_rng(seed)
    keep = np.ones((batch, 1, keys, keys), bool)
    keep[-1, :, :, keys - 2 :] = False
    if empty_rows:
        keep[0, :, 1] = False
        keep[-1, :, keys - 1] = False
    return {"x": rng.standard_normal((batch, keys, _WIDTH)).astype(np.float32), "keep": keep}


def numpy_softmax(x: Array) -> Array:
    """Return the softmax over the last axis, NaN for rows of -inf alone."""
    with np.errstate(invalid="ignore"):
        e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def outputs(
    model: ir.Model, feeds: Feeds, *taps: str, optimization: Optimization = Optimization.OFF
) -> list[Array]:
    """Return the output and tapped values of a model."""
    session = Session(model, threads=1, optimization=optimization, taps=taps)
    held = session.run(feeds, taps=taps)
    return [held[name] for name in ("y", *taps)]
