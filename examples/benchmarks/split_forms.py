# SPDX-License-Identifier: Apache-2.0
"""Weights of a model rounded as plain or split layers would hold them, written back in float: the accuracy of
forms that no kernel carries, simulated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from splitfold.passes.block_grid import BlockLayout
from splitfold.passes.layers import LINEAR, Layer, LayerKind, find_layers
from splitfold.passes.part_codes import Grain, Grouping, PartGrid, code_parts
from splitfold.passes.split_weight import Partition, SplitBy, SplitScope, matrix_of, weight_of
from splitfold.runtime.feeds import Array

__all__ = ["Form", "Index", "forms", "linear_layers", "part_index", "write_rounded"]

PARTS = 3
BLOCK = 128
WIDEST = 16
"""Bits of the widest grid that plain weights get: more, and they could stay float16."""
_SCALE = 4

Index = Callable[[Layer], Array]


@dataclass(frozen=True)
class Form:
    """How weights are held.

    Attributes:
        bits: of a code.
        grain: which weights share a scale and a zero point: the tensor's, an output channel's, a block's.
        parts: 1 is plain; 3 is split by exact k-means over the tensor, each part on grids of its own.
        grid: of parts: zero, as parallel layers hold them, or their own interval (quantize-parts).
        equal_to: the bits of the split form whose storage this plain one has.
    """

    bits: int
    grain: Grain
    parts: int = 1
    grid: PartGrid = PartGrid.ZERO
    equal_to: int | None = None

    def __str__(self) -> str:
        where = f"block {BLOCK}" if self.grain is Grain.BLOCK else f"per {self.grain.value}"
        if self.parts > 1:
            own = ", own grids, one code" if self.grid is PartGrid.OWN else ""
            return f"INT{self.bits} split + {where}{own}"
        if self.equal_to is not None:
            return f"  plain at equal storage: INT{self.bits} {where}"
        return f"INT{self.bits} plain {where}"

    def rounded(self, layer: Layer, index: Index) -> tuple[Array, float]:
        """Return the weight as it comes back, in its shape, and the bits that all of it takes as stored."""
        matrix = matrix_of(layer, layer.weight_array())
        grouping = Grouping(self.grain, BLOCK)
        if self.parts == 1:
            x = grouping.grouped(matrix, 0)
            layout = BlockLayout(self.bits, x.shape[2], symmetric=False, levels=2**self.bits)
            back = layout.grid(x).round_trip(x).reshape(len(matrix), -1)[:, : matrix.shape[1]]
            stored = x.size * self.bits + x.shape[0] * x.shape[1] * (8 * _SCALE + self.bits)
            return weight_of(layer, np.ascontiguousarray(back)), stored
        codes = code_parts(
            matrix, matrix_of(layer, index(layer)), grouping, bits=self.bits, symmetric=False, grid=self.grid
        )
        if self.grid is PartGrid.OWN:
            return weight_of(layer, codes.values()), 8 * codes.stored_bytes()
        stored = codes.parts * codes.codes.size * self.bits + codes.scales.size * (8 * _SCALE + self.bits)
        return weight_of(layer, codes.values()), stored

    def plain_at_equal_storage(self) -> Form:
        """Return the widest plain form that takes no more bits than the layers of this split one."""
        bits = min(WIDEST, self.parts * self.bits)
        return replace(self, bits=bits, parts=1, grid=PartGrid.ZERO, equal_to=self.bits)


def forms(bits: int) -> list[Form]:
    """Return the rows of one bit width."""
    per_tensor, blocks = Form(bits, Grain.TENSOR, PARTS), Form(bits, Grain.BLOCK, PARTS)
    return [
        *(Form(bits, grain) for grain in Grain),
        per_tensor,
        per_tensor.plain_at_equal_storage(),
        blocks,
        blocks.plain_at_equal_storage(),
        Form(bits, Grain.BLOCK, PARTS, PartGrid.OWN),
    ]


def linear_layers(model: ir.Model, *, tables: bool = False) -> list[Layer]:
    """Return the linear layers, which are what the paper quantizes; with `tables` those of a Gather too."""
    kinds = (*LINEAR, LayerKind.EMBEDDING) if tables else LINEAR
    return [layer for layer in find_layers(model)[0] if layer.kind in kinds]


def part_index() -> Index:
    """Return what gives the parts of a weight, clustered once."""
    known: dict[str, Array] = {}
    partition = Partition(PARTS, SplitBy.KMEANS, SplitScope.TENSOR)

    def index(layer: Layer) -> Array:
        name = layer.weight.name or ""
        if name not in known:
            known[name] = partition.index(layer)
        return known[name]

    return index


def write_rounded(model: ir.Model, form: Form, index: Index, path: Path, *, tables: bool = False) -> float:
    """Write `model` with rounded linear weights, and return the bits a weight that `form` would store.

    Args:
        model: canonical, not changed.
        form: how they are held.
        index: of `part_index`, one for a model.
        path: where the float file goes.
        tables: whether tables of embeddings are rounded too.
    """
    copy = model.clone()
    held: dict[str, tuple[Array, float]] = {}
    layers: Sequence[Layer] = linear_layers(copy, tables=tables)
    for layer in layers:
        name = layer.weight.name or ""
        if name not in held:
            held[name] = form.rounded(layer, index)
    for layer in layers:
        rounded = held[layer.weight.name or ""][0].astype(np.float32)
        layer.weight.const_value = ir.tensor(rounded, name=layer.weight.name)
    ir.save(copy, path)
    return sum(bits for _, bits in held.values()) / sum(array.size for array, _ in held.values())
