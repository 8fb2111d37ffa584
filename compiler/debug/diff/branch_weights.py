# SPDX-License-Identifier: Apache-2.0
"""The weight of a layer that a pass wrote as several branches, put together again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from splitfold.compiler.debug.diff.held import Held, Role, held_by
from splitfold.compiler.debug.diff.match import Side
from splitfold.compiler.debug.diff.picked_channels import order_of_outputs, picked_inputs
from splitfold.passes.branches import BranchKind, branches_of, last_branch, value_of_layer
from splitfold.passes.provenance import stands_for
from splitfold.runtime.feeds import Array

__all__ = ["whole_weight"]

_REACH = 4
"""Operators from the value that stands for a branch back to its product."""


def whole_weight(nodes: Sequence[ir.Node], side: Side) -> Held | None:
    """Return the weight that all branches of a layer hold together, or None where `nodes` compute no branch.

    Args:
        nodes: that compute a value of the layer, one of its branches among them.
        side: their model.
    """
    marked = next((v for node in nodes for v in node.outputs if branches_of(v)), None)
    return _held(value_of_layer(stands_for(marked) or ""), side) if marked is not None else None


def _held(name: str, side: Side) -> Held | None:
    branches = dict(_branches(name, side))
    if not branches:
        return _product(name, side)
    found = [_held(branch, side) for branch in branches]
    parts = [held for held in found if held is not None]
    if len(parts) != len(found):
        return None
    kind, names = next(iter(branches.values())), list(branches)
    if kind is BranchKind.PART:
        return _summed(parts, [_picked(branch, side) for branch in names])
    return _joined(parts, kind, order_of_outputs(side.by_key[(True, names[0])][0].outputs[0]))


def _branches(name: str, side: Side) -> Iterator[tuple[str, BranchKind]]:
    """Yield the branches of the value of this name, in order."""
    for original, key in list(side.by_key):
        last = last_branch(key) if original else None
        if last is not None and last[0] == name:
            yield key, last[1].kind


def _product(name: str, side: Side) -> Held | None:
    """Return the weight of the operator that makes the value, before its casts, scales and bias."""
    node = _producer(name, side)
    return held_by(node)[Role.WEIGHT] if node is not None else None


def _producer(name: str, side: Side) -> ir.Node | None:
    node: ir.Node | None = side.by_key[(True, name)][-1]
    for _ in range(_REACH):
        if node is None or held_by(node).get(Role.WEIGHT) is not None:
            return node
        makers = [value.producer() for value in node.inputs if value is not None]
        node = next((maker for maker in makers if maker is not None), None)
    return None


def _picked(branch: str, side: Side) -> Array | None:
    node = _producer(branch, side)
    return picked_inputs(node) if node is not None else None


def _summed(held: Sequence[Held], picked: Sequence[Array | None]) -> Held:
    """Return the sum of parts; one that holds some input channels only stands in their place."""

    def numbers() -> Array:
        arrays = [part.numbers() for part in held]
        total = np.array(arrays[0])
        for array, channels in zip(arrays[1:], picked[1:], strict=True):
            if channels is None or array.shape == total.shape:
                total = total + array
            else:
                np.add.at(np.moveaxis(total, max(0, held[0].channels[0]), 0), channels, array)
        return total

    return _whole(held, BranchKind.PART, numbers)


def _joined(held: Sequence[Held], kind: BranchKind, order: Array | None) -> Held:
    """Return the weights of branches one after the other, their output channels in `order`."""
    axis = max(0, held[0].channels[0 if kind is BranchKind.CHUNK else 1])

    def numbers() -> Array:
        whole = np.concatenate([part.numbers() for part in held], axis)
        return whole if order is None or kind is BranchKind.CHUNK else np.take(whole, order, axis)

    return _whole(held, kind, numbers)


def _whole(held: Sequence[Held], kind: BranchKind, numbers: Callable[[], Array]) -> Held:
    first = held[0]
    rest = [value for part in held[1:] for value in (part.value, *part.parts)]
    form = ", ".join(filter(None, [first.form, f"the first of {len(held)} {kind.value}s"]))
    return Held(first.value, (*first.parts, *rest), numbers, first.channels, form)
