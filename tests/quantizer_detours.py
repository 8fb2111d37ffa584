# SPDX-License-Identifier: Apache-2.0
"""Q/DQ around operators that move elements, as other tools write them, put into any model."""

from __future__ import annotations

import numpy as np
from detours import Made, constant_of, node_of

__all__ = ["through_quantizers"]


def through_quantizers(rng: np.random.Generator, value: str, rank: int) -> Made:
    """Return a round trip of `value` through one grid: and, quantized after each step, two Transposes that
    undo each other, a Split and a Concat that does, or a sum of what two equal quantizers give."""
    made = _Chain(rng, value)
    kind = int(rng.integers(4))
    if kind == 0:
        perm = [0, *(1 + rng.permutation(rank - 1)).tolist()]
        there = made.op("Transpose", [made.round_trip(value)], perm=perm)
        made.end = made.op("Transpose", [made.round_trip(there)], perm=np.argsort(perm).tolist())
    elif kind == 1:
        parts = [f"{value}_part{number}" for number in range(2)]
        made.nodes.append(node_of("Split", [value], parts, axis=0, num_outputs=2))
        made.end = made.round_trip(made.op("Concat", [made.round_trip(part) for part in parts], axis=0))
    elif kind == 2:
        both = [made.round_trip(value) for _ in range(2)]
        made.end = made.op("Add", both)
    else:
        shape = made.op("Shape", [made.round_trip(value)])
        made.end = made.round_trip(made.op("Reshape", [made.round_trip(value), shape]))
    return made.nodes, made.constants, made.end


class _Chain:
    """Nodes and constants of one detour, and the name of its last value."""

    def __init__(self, rng: np.random.Generator, value: str) -> None:
        self._base, self._count = value, 0
        signed = bool(rng.integers(2))
        zero = constant_of(
            f"{value}_zero", rng.integers(-9, 9) if signed else 128, np.int8 if signed else np.uint8
        )
        scale = constant_of(f"{value}_scale", rng.uniform(0.01, 0.05))
        self.nodes, self.constants, self.end = [], [scale, zero], value
        self._grid = [scale.name, zero.name]

    def op(self, op_type: str, inputs: list[str], **attributes: object) -> str:
        self._count += 1
        output = f"{self._base}_detour{self._count}"
        self.nodes.append(node_of(op_type, inputs, [output], **attributes))
        return output

    def round_trip(self, value: str) -> str:
        return self.op("DequantizeLinear", [self.op("QuantizeLinear", [value, *self._grid]), *self._grid])
