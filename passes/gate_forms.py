# SPDX-License-Identifier: Apache-2.0
"""The three gates of gated attention as operators, with weights that start as the identity."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitfold.passes.values import add_initializer, emit
from splitfold.runtime.feeds import Array

__all__ = ["Gate", "GateKind", "emit_gate"]


class GateKind(enum.Enum):
    """What a head's gate reads of the attention's input x (Bondarenko et al., 2023, table 4)."""

    LINEAR = "linear"
    """Its own slice of x, as long as x is wide over the number of heads."""
    MLP = "mlp"
    """The same, through a hidden layer with ReLU."""
    ALL_HEADS = "all-heads"
    """All of x: one layer for all heads."""

    @property
    def is_per_head(self) -> bool:
        """Whether each head reads a slice of its own."""
        return self is not GateKind.ALL_HEADS


@dataclass(frozen=True)
class Gate:
    """One block's gate, before it is trained.

    Attributes:
        kind: what it reads.
        heads: how many it gates.
        width: of the attention's input.
        start: how far open each gate starts, between 0 and 1.
        keeps: whether it is divided by `start`, so that attention starts as it was.
        hidden: width of the hidden layer.
        seed: of the weights of the hidden layer.
    """

    kind: GateKind
    heads: int
    width: int
    start: float
    keeps: bool
    hidden: int
    seed: int

    @property
    def bias(self) -> float:
        """The logit of `start`."""
        return math.log(self.start / (1 - self.start))

    def weights(self) -> dict[str, Array]:
        """Return float32 weights by name: zeros in the last layer, so that every gate starts at `start`."""
        bias = np.full(self.heads, self.bias, np.float32)
        if self.kind is GateKind.ALL_HEADS:
            return {"weight": np.zeros((self.width, self.heads), np.float32), "bias": bias}
        size = self.width // self.heads
        if self.kind is GateKind.LINEAR:
            return {
                "weight": np.zeros((self.heads, size, 1), np.float32),
                "bias": bias.reshape(self.heads, 1, 1),
            }
        random = np.random.default_rng(self.seed)
        first = random.standard_normal((self.heads, size, self.hidden)) / math.sqrt(size)
        return {
            "hidden.weight": first.astype(np.float32),
            "hidden.bias": np.zeros((self.heads, 1, self.hidden), np.float32),
            "weight": np.zeros((self.heads, self.hidden, 1), np.float32),
            "bias": bias.reshape(self.heads, 1, 1),
        }


def emit_gate(gate: Gate, x: ir.Value, rank: int, before: ir.Node, name: str) -> ir.Value:
    """Emit a gate before a node, and return it: [..., heads, 1] with the leading axes of x.

    Args:
        gate: which one.
        x: the attention's input, [..., width].
        rank: of x.
        before: the node that it precedes.
        name: of the block, for the weights.
    """
    graph = before.graph
    if graph is None:
        raise ValueError(f"{before.name} is in no graph")
    dtype = x.dtype.numpy() if x.dtype is not None else np.dtype(np.float32)
    held = {
        key: add_initializer(graph, f"{name}.gate.{key}", array.astype(dtype))
        for key, array in gate.weights().items()
    }
    made = _Emitter(before, name, x.dtype)
    if gate.kind is GateKind.ALL_HEADS:
        logits = made("Add", made("MatMul", x, held["weight"]), held["bias"])
        logits = made("Unsqueeze", logits, made.ints("last", [-1]))
    else:
        logits = _per_head(gate, x, rank, held, made)
    opened = made("Sigmoid", logits)
    if not gate.keeps:
        return opened
    factor = np.array(_inverse(gate, dtype), dtype)
    return made("Mul", opened, add_initializer(graph, f"{name}.gate.factor", factor))


def _inverse(gate: Gate, dtype: np.dtype[np.generic]) -> float:
    """Return 1 over what a gate starts at, in the arithmetic of the kernel as far as it can be told."""
    return float(1 / (1 / (1 + np.exp(-np.asarray(gate.bias, dtype).astype(np.float64)))))


def _per_head(gate: Gate, x: ir.Value, rank: int, held: dict[str, ir.Value], made: _Emitter) -> ir.Value:
    """Return logits [..., heads, 1] of slices of x: heads become a batch axis, so each has a weight."""
    size = gate.width // gate.heads
    apart = made("Reshape", x, made.ints("apart", [0] * (rank - 1) + [gate.heads, size]))
    swap = [*range(rank - 2), rank - 1, rank - 2, rank]
    slices = made("Transpose", apart, perm=swap)
    if gate.kind is GateKind.MLP:
        inner = made("MatMul", slices, held["hidden.weight"])
        slices = made("Relu", made("Add", inner, held["hidden.bias"]))
    logits = made("Add", made("MatMul", slices, held["weight"]), held["bias"])
    return made("Transpose", logits, perm=swap)


@dataclass(frozen=True)
class _Emitter:
    """Emits operators of one gate."""

    before: ir.Node
    name: str
    dtype: ir.DataType | None

    def __call__(self, op_type: str, *inputs: ir.Value, perm: Sequence[int] | None = None) -> ir.Value:
        return emit(
            self.before,
            op_type,
            list(inputs),
            attributes={"perm": tuple(perm)} if perm is not None else None,
            names=[f"{self.name}.gate.{op_type.lower()}"],
            dtype=self.dtype,
        )

    def ints(self, key: str, numbers: Sequence[int]) -> ir.Value:
        """Return a constant of int64 numbers."""
        graph = self.before.graph
        if graph is None:
            raise ValueError(f"{self.before.name} is in no graph")
        return add_initializer(graph, f"{self.name}.gate.{key}", np.array(numbers, np.int64))
