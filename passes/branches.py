# SPDX-License-Identifier: Apache-2.0
"""Branches: operators that together compute what one layer computed. Their outputs say so by what they stand
for.

``y [part 2 of 3]`` is a summand of the original value ``y`` whose weight covers all of the layer's weight,
with zeros where other parts hold it; ``chunk`` is a summand that reads some of the input channels; ``slice``
and ``group`` compute some of the output channels. Passes that replace a branch hand this on, as they do with
any value.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

import onnx_ir as ir

from splitfold.passes.provenance import stand_for, stands_for
from splitfold.passes.values import sole_consumer

__all__ = ["Branch", "BranchKind", "branch_of_node", "branches_of", "covers_again", "mark_branch"]

_MARK = re.compile(r" \[(?P<kind>[a-z]+) (?P<number>\d+) of (?P<count>\d+)\]")
_REACH = 4
"""Operators from a product to the value that stands for it: cast, scale, bias."""


class BranchKind(enum.Enum):
    """What a branch holds of its layer."""

    PART = "part"
    """Some weights, zeros in the place of the others: the branches' outputs are summed."""
    CHUNK = "chunk"
    """The weights of some input channels: the branches' outputs are summed."""
    SLICE = "slice"
    """The weights of some output channels, or a function of them: the branches' outputs are concatenated."""
    GROUP = "group"
    """The weights of some groups of a convolution: the branches' outputs are concatenated."""

    @property
    def is_joined(self) -> bool:
        """Whether the branches' outputs are concatenated, along the channels; else they are summed."""
        return self in (BranchKind.SLICE, BranchKind.GROUP)


@dataclass(frozen=True)
class Branch:
    """Which branch of a layer a value is: the `number`-th (from 1) of `count`."""

    kind: BranchKind
    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.kind.value} {self.number} of {self.count}"


def mark_branch(value: ir.Value, whole: ir.Value, branch: Branch) -> None:
    """Record that `value` is this branch of `whole`, or of what `whole` stands for."""
    stand_for(value, f"{stands_for(whole) or whole.name} [{branch}]")


def branches_of(value: ir.Value) -> tuple[Branch, ...]:
    """Return which branch `value` is, of which branch, the outermost split first; empty where it is whole."""
    marks = _MARK.finditer(stands_for(value) or "")
    return tuple(Branch(BranchKind(mark["kind"]), int(mark["number"]), int(mark["count"])) for mark in marks)


def covers_again(node: ir.Node) -> bool:
    """Return whether the weight of `node` covers weights of its layer that another branch counts already: it
    is a part, and not the first."""
    return any(mark.kind is BranchKind.PART and mark.number > 1 for mark in branch_of_node(node))


def branch_of_node(node: ir.Node) -> tuple[Branch, ...]:
    """Return which branch `node` computes.

    What it computes may pass through casts, scales and a bias before it stands for the branch; values on that
    way are new.
    """
    value = node.outputs[0]
    for _ in range(_REACH):
        reader = sole_consumer(value)
        if stands_for(value) is not None or reader is None or len(reader.outputs) != 1:
            break
        value = reader.outputs[0]
    return branches_of(value)
